"""Clause NORM: RMSNorm of queries and keys in float32, with 1 + w and eps inside the root."""

from __future__ import annotations

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.premises import BOTH_STREAMS, CONTEXT, NORM_EPS, SEVERAL_TOKENS, UNCENTRED
from lyra.conformance.registry import prop
from lyra.conformance.shaped import beside_vanilla
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject
from lyra.spec.attention import QKNormSpec


def normed(case: Case) -> Case:
    """The case with a norm, whatever its sizes say."""
    return case if case.spec.qk_norm is not None else case.respec(qk_norm=QKNormSpec())


@prop(
    "NORM-1",
    premise=NORM_EPS,
    case=lambda scope: cases(scope, flavours=("small",), far=False).map(normed),
    needs=("static",),
)
def test_eps_decides_small_inputs(case: Case, judge: Judge) -> None:
    """Inputs so small that eps matters: a wrong eps, or one outside the root, is far out of tolerance."""
    judge.oracle(case)


@prop(
    "NORM-1",
    premise=UNCENTRED,
    case=lambda scope: cases(scope, flavours=("large", "offset")).map(normed),
    needs=("static",),
)
def test_norm_of_large_inputs(case: Case, judge: Judge) -> None:
    """Inputs of size 1,000, or with a mean far from zero (which an RMSNorm does not subtract)."""
    judge.oracle(case)


@prop(
    "NORM-1",
    premise=SEVERAL_TOKENS,
    case=lambda scope: cases(scope, context=False, far=False, flavours=("normal", "large")).map(normed),
)
def test_norm_forgets_the_size(case: Case, judge: Judge) -> None:
    """With eps next to nothing, four times the query projection gives the same layer."""
    case = case.respec(bias=False, qk_norm=QKNormSpec(eps=1e-30))  # no subnormal number: XLA takes those for 0
    problem = case.problem()
    grown = problem.replace(weights=problem.weights | {"q_proj.weight": 4 * problem.weights["q_proj.weight"]})

    def check(subject: Subject) -> None:
        subject.expect_close(problem, subject.run(grown).output, subject.run(problem).output, "the smaller projection")

    judge.each(case, check)


@prop(
    "NORM-2",
    premise=(BOTH_STREAMS, CONTEXT),
    case=lambda scope: (
        cases(scope, context=True, min_context=1, live=("causal",)).map(normed).map(beside_vanilla(scope))
    ),
    needs=("static", "trace"),
)
def test_one_norm_for_both_streams(case: Case, judge: Judge) -> None:
    """Normed queries and keys do not depend on which stream their head belongs to."""
    problem = case.problem()
    plain = problem.replace(static=None).with_split(None)

    def check(subject: Subject) -> None:
        split, whole = subject.run(problem, trace=True), subject.run(plain, trace=True)
        for name in ("q_norm", "k_norm"):
            subject.expect_close(problem, split.trace[name], whole.trace[name], "the layer without a split", name)

    judge.each(case, check)
