"""Clause TOLERANCE: the oracle's σ, K, and the same bits twice."""

from __future__ import annotations

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.premises import CONTEXT, HIDDEN, PADDING, SEVERAL_CALLS, SEVERAL_TOKENS
from lyra.conformance.registry import prop
from lyra.conformance.shaped import hidden_slots, mostly, often, padded
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject


@prop(
    "TOLERANCE-1",
    "STATIC-1",
    premise=(CONTEXT, PADDING, HIDDEN, SEVERAL_CALLS),
    case=lambda scope: (
        (cases(scope) | cases(scope, context=True, min_context=3)).map(mostly(hidden_slots)).map(often(padded))
    ),
    needs=("static",),
    weight=3,
)
def test_every_backend_equals_oracle_and_each_other(case: Case, judge: Judge) -> None:
    """Anything the spec allows: every backend within K·σ of the oracle, any two within K·√2·σ of each other."""
    judge.oracle(case)


@prop("TOLERANCE-3", premise=SEVERAL_TOKENS, case=cases, needs=("static",))
def test_the_same_bits_twice(case: Case, judge: Judge) -> None:
    """The same call gives the same bits twice."""
    problem = case.problem()

    def check(subject: Subject) -> None:
        first = subject.run(problem)
        subject.expect_equal(problem, subject.run(problem).output, first.output, "its own first answer")
        subject.expect_oracle(problem, first)

    judge.each(case, check)
