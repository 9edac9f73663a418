"""Clause ORDER: project, norm, rope, attend, output."""

from __future__ import annotations

from hypothesis import strategies as st

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.premises import BARE, BIAS, CONTEXT, ONE_SOFTMAX, ROTATED, SEVERAL_TOKENS
from lyra.conformance.registry import prop
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject


@prop(
    "ORDER-1",
    "NORM-1",
    "ROPE-1",
    "ROPE-2",
    "SCALE-1",
    "SPLIT-1",
    "TOLERANCE-1",
    premise=(SEVERAL_TOKENS, ROTATED),
    case=lambda scope: cases(scope, context=False),
    weight=2,
)
def test_layer_equals_oracle(case: Case, judge: Judge) -> None:
    """A layer without a context equals the oracle: every stage, in the one order."""
    judge.oracle(case)


@prop(
    "ORDER-3",
    "TOLERANCE-2",
    "ORDER-1",
    "NORM-1",
    "ROPE-1",
    premise=(ROTATED, CONTEXT),
    case=lambda scope: st.one_of(cases(scope), cases(scope, context=True, min_context=1)),
    needs=("static", "trace"),
    weight=2,
)
def test_every_stage_equals_oracle(case: Case, judge: Judge) -> None:
    """Every traced stage equals the oracle run on the backend's own previous stage."""
    problem = case.problem()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        subject.expect_stages(problem, outcome)
        subject.expect_equal(problem, outcome.trace["output"], outcome.output, "the trace's own output")

    judge.each(case, check)


@prop("ORDER-3", premise=BARE, case=cases, needs=("static", "trace"), weight=0.5)
def test_absent_stages_leave_no_trace(case: Case, judge: Judge) -> None:
    """A layer without norm, without RoPE or without both traces the stages it has, and these equal the oracle."""
    bare = [case.respec(qk_norm=None), case.respec(rope=None), case.respec(qk_norm=None, rope=None)]
    problem = bare[case.seed % 3].problem()

    def check(subject: Subject) -> None:
        subject.expect_stages(problem, subject.run(problem, trace=True))

    judge.each(case, check)


@prop("ORDER-1", "TOLERANCE-1", premise=BIAS, case=lambda scope: cases(scope, context=False), weight=0.5)
def test_every_projection_has_its_bias(case: Case, judge: Judge) -> None:
    """A layer with biases equals the oracle: one forgotten on any of the four projections shows."""
    judge.oracle(case.respec(bias=True))


@prop(
    "ORDER-2",
    "STATIC-1",
    premise=ONE_SOFTMAX,
    case=lambda scope: cases(scope, context=True, min_context=1, flavours=("normal",)),
    needs=("static",),
)
def test_values_are_neither_normed_nor_rotated(case: Case, judge: Judge) -> None:
    """Doubling every value, static and live, doubles the output bit for bit: no norm or rotation touches them."""
    case = case.respec(bias=False).replace(poison=1.0)
    problem = case.problem()
    assert problem.static is not None
    doubled = problem.replace(
        weights=problem.weights | {"v_proj.weight": 2 * problem.weights["v_proj.weight"]},
        static=problem.static._replace(v=2 * problem.static.v),
    )

    def check(subject: Subject) -> None:
        single = subject.run(problem)
        subject.expect_equal(
            problem, subject.run(doubled).output, 2 * single.output, "twice the output for half the values"
        )
        subject.expect_oracle(problem, single)

    judge.each(case, check)
