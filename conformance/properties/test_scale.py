"""Clause SCALE: the scale of the spec, softcap before the mask, a stable softmax."""

from __future__ import annotations

import numpy as np

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.registry import prop
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject


@prop("SCALE-1", case=cases(flavours=("peaked", "normal")).map(lambda c: c.respec(scale=168**-0.5)), needs=("static",))
def test_scale_is_not_head_dim(case: Case, judge: Judge) -> None:
    """The 27B's scale, 168 ** -0.5, whatever head_dim is."""
    judge.oracle(case)


@prop("SCALE-2", "MASKED-1", case=cases(flavours=("peaked",)).map(lambda c: c.respec(softcap=0.7)), needs=("static",))
def test_softcap_before_the_mask(case: Case, judge: Judge) -> None:
    """A small softcap on peaked scores, with padding and hidden slots: capping a mask would let them through."""
    judge.oracle(case)


@prop("SCALE-3", case=cases(flavours=("peaked",)).map(lambda c: c.respec(scale=3.0, softcap=None)), needs=("static",))
def test_peaked_scores(case: Case, judge: Judge) -> None:
    """Scores hundreds apart: the softmax is nearly one-hot and still right."""
    judge.oracle(case)


@prop("SCALE-3", case=cases(context=False, flavours=("large",), padding=False), needs=())
def test_huge_scores_stay_finite(case: Case, judge: Judge) -> None:
    """Unnormed inputs of size 1,000 give scores far beyond what exp can take without a stable softmax."""
    problem = case.respec(qk_norm=None, softcap=None, scale=1e-2).problem()
    grown = {name: 100 * problem.weights[name] for name in ("q_proj.weight", "k_proj.weight")}
    problem = problem.replace(weights=problem.weights | grown)

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect(problem, bool(np.isfinite(outcome.output).all()), "the output is not finite")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop("SCALE-1", case=cases(context=False, flavours=("normal", "offset")))
def test_scale_moves_between_query_and_key(case: Case, judge: Judge) -> None:
    """Twice the query norm's gain with half the scale gives the same layer."""
    problem = case.problem()
    if problem.spec.qk_norm is None:
        names = ["q_proj.weight"] + (["q_proj.bias"] if problem.spec.bias else [])
        weights = {name: 2 * problem.weights[name] for name in names}
    else:
        weights = {"q_norm.weight": 2 * (1 + problem.weights["q_norm.weight"]) - 1}
    moved = problem.replace(weights=problem.weights | weights).respec(scale=problem.spec.scale / 2)

    def check(subject: Subject) -> None:
        subject.expect_oracle(moved, subject.run(moved))
        subject.expect_close(problem, subject.run(moved).output, subject.run(problem).output, "the scale in one place")

    judge.each(case, check)
