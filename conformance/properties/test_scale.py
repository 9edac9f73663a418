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
    """Unnormed inputs of size 1,000 give scores far beyond what exp can take without a stable softmax.

    They are some 10,000, not more: where rounding moves a score by 1, the softmax may choose another key.
    """
    problem = case.respec(qk_norm=None, softcap=None, scale=1e-6).problem()
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


@prop("SCALE-4", case=cases(poison=(1e4,)), needs=("static",), weight=0.5)
def test_powers_of_two_move_between_queries_and_keys(case: Case, judge: Judge) -> None:
    """Queries times 4 and keys, static ones too, divided by 4: the same bits, since powers of two do not round."""
    problem = case.problem()
    spec = problem.spec
    names = ("norm.weight",) if spec.qk_norm is not None else ("proj.weight", "proj.bias")[: 1 + spec.bias]
    weights, scaled = dict(problem.weights), dict(problem.weights)
    for kind, factor in (("q", 4.0), ("k", 0.25)):
        for name in (f"{kind}_{name}" for name in names):
            if name.endswith("norm.weight"):  # 1 + w of few bits, so that factor · (1 + w) − 1 does not round either
                gain = np.round((1 + problem.weights[name]) * 256) / 256
                weights[name], scaled[name] = gain - 1, factor * gain - 1
            else:
                scaled[name] = factor * problem.weights[name]
    static = problem.static
    moved = problem.replace(weights=scaled, static=None if static is None else static._replace(k=static.k / 4))
    problem = problem.replace(weights=weights)

    def check(subject: Subject) -> None:
        here = subject.run(problem)
        subject.expect_equal(problem, subject.run(moved).output, here.output, "the factor on the other side")
        subject.expect_oracle(problem, here)

    judge.each(case, check)


@prop(
    "SCALE-1",
    "STATIC-1",
    case=cases(flavours=("normal",), far=False, poison=(1e4,)),
    needs=("static",),
    weight=0.5,
    profile="ci",
)
def test_one_vector_added_to_all_keys_changes_nothing(case: Case, judge: Judge) -> None:
    """Without RoPE, one vector added to all keys of a KV head, live and static, moves all scores of a query alike."""
    problem = case.respec(qk_norm=None, rope=None, softcap=None, bias=True).problem()
    spec, static = problem.spec, problem.static
    vector = np.random.default_rng(case.seed).normal(size=(spec.num_key_value_heads, spec.head_dim)).astype(np.float32)
    bias = problem.weights["k_proj.bias"] + vector.ravel()
    moved = problem.replace(
        weights=problem.weights | {"k_proj.bias": bias},
        static=None if static is None else static._replace(k=static.k + vector[list(spec.lyra_kv_heads), None]),
    )

    def check(subject: Subject) -> None:
        subject.expect_close(moved, subject.run(moved).output, subject.run(problem).output, "the keys as they were")

    judge.each(case, check)
