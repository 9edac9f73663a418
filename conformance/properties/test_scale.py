"""Clause SCALE: the scale of the spec, softcap before the mask, a stable softmax."""

from __future__ import annotations

import numpy as np

from lyra.conformance.case import Case, Problem
from lyra.conformance.judge import Judge
from lyra.conformance.premises import (
    BEHIND_WINDOW,
    HIDDEN,
    ODD_SCALE,
    ONE_SOFTMAX,
    PADDING,
    PEAKED,
    SEVERAL_TOKENS,
    SOFTCAP,
    Premise,
)
from lyra.conformance.registry import prop
from lyra.conformance.scored import scored
from lyra.conformance.shaped import hidden_slots, scored_by_first_element
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject


@prop(
    "SCALE-1",
    premise=ODD_SCALE,
    case=lambda scope: cases(scope, flavours=("peaked", "normal")).map(lambda c: c.respec(scale=168**-0.5)),
    needs=("static",),
)
def test_scale_is_not_head_dim(case: Case, judge: Judge) -> None:
    """The 27B's scale, 168 ** -0.5, whatever head_dim is."""
    judge.oracle(case)


@prop(
    "SCALE-2",
    "MASKED-1",
    premise=(SOFTCAP, PADDING, HIDDEN),
    case=lambda scope: cases(scope, context=True, min_context=1, flavours=("peaked",)).map(
        lambda c: c.respec(softcap=0.7).hiding()
    ),
    needs=("static",),
)
def test_softcap_before_the_mask(case: Case, judge: Judge) -> None:
    """A small softcap on peaked scores, with padding and hidden slots: capping a mask would let them through."""
    judge.oracle(case)


@prop(
    "SCALE-3",
    premise=PEAKED,
    case=lambda scope: cases(scope, flavours=("peaked",)).map(lambda c: c.respec(scale=3.0, softcap=None)),
    needs=("static",),
)
def test_peaked_scores(case: Case, judge: Judge) -> None:
    """Scores hundreds apart: the softmax is nearly one-hot and still right."""
    judge.oracle(case)


LIMIT = 10_000.0
"""The size of scores that SCALE-3 speaks of."""

SIZE = LIMIT
"""What is drawn: with a few units more or less it is exact in float32, so that no rounding chooses the key."""


def both_signs(problem: Problem) -> bool:
    """Whether queries see scores of LIMIT and more, and of -LIMIT and less."""
    parts = scored(problem)
    high = any((part.top >= LIMIT).any() for part in parts)
    return high and any((part.low <= -LIMIT).any() for part in parts)


def hidden_far_above(problem: Problem) -> bool:
    """Whether a query sees scores of -LIMIT and less only, while one of LIMIT and more is hidden from it."""
    return any(
        bool((part.seen.any(axis=-1) & (part.top <= -LIMIT) & (part.hidden_top >= LIMIT)).any())
        for part in scored(problem)
    )


HUGE = Premise("visible scores of 10,000 and of -10,000", both_signs, names={"SIZE": 3.0})
HIDDEN_ABOVE = Premise("a hidden score 20,000 above all that are visible", hidden_far_above, names={"SIZE": 3.0})


def with_huge_scores(case: Case, first: float) -> Problem:
    """The case with scores of SIZE and up to 3 more, exact, of either sign.

    The first token of a row has the sign `first`. What is hidden for good, padding and static slots, and the last token
    of a row, which the others may not see yet, have positive ones; so have some others, unless `first` is positive.
    """
    problem = scored_by_first_element(case)
    rng = np.random.default_rng([case.seed, 24])
    turn = np.cumsum(problem.mask, axis=1)
    signs = np.where(rng.random(turn.shape) < (0.5 if first < 0 else 0.0), 1.0, -1.0)
    signs[turn == 1] = first
    signs[(turn == turn[:, -1:]) | ~problem.mask] = 1.0
    x = problem.x.copy()
    x[:, :, 0] = signs * (SIZE + rng.integers(0, 4, turn.shape))
    static = problem.static
    if static is not None:
        some = rng.random(static.mask.shape) < rng.choice([0.0, 0.5])
        signs = np.where(static.mask & ~some, -1.0, 1.0)
        k = static.k.copy()
        k[:, :, :, 0] = (signs * (SIZE + rng.integers(0, 4, signs.shape)))[:, None]
        static = static._replace(k=k)
    return problem.replace(x=x, static=static)


def hold_finite(case: Case, problem: Problem, judge: Judge) -> None:
    """Finite outputs, the oracle's."""

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect(problem, bool(np.isfinite(outcome.output).all()), "the output is not finite")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "SCALE-3",
    "MASKED-1",
    premise=(HUGE, HIDDEN_ABOVE, HIDDEN),
    case=lambda scope: cases(scope, context=True, min_context=1, min_tokens=3, poison=(1.0, 1e4)).map(hidden_slots),
    needs=("static",),
)
def test_huge_scores_stay_finite(case: Case, judge: Judge) -> None:
    """Visible and hidden scores of ±10,000, static and live: finite outputs, and nothing hidden counts.

    Scores near each other differ by whole units: where rounding moves a score by 1, the softmax may choose another key.
    """
    problem = with_huge_scores(case.replace(padding=tuple(min(n, case.tokens - 3) for n in case.padding)), -1.0)
    hold_finite(case, problem, judge)


@prop(
    "SCALE-3",
    "SLIDING-1",
    "MASKED-1",
    premise=(HUGE, HIDDEN_ABOVE, BEHIND_WINDOW),
    case=lambda scope: cases(scope, window=True, min_tokens=4, padding=False),
    weight=0.5,
)
def test_huge_scores_behind_a_window(case: Case, judge: Judge) -> None:
    """Within the window scores of -10,000, behind it and ahead 10,000: these do not count, and nothing overflows."""
    window = case.spec.sliding_window or 1
    hold_finite(case, with_huge_scores(case.respec(sliding_window=1 + (window - 1) % 2), 1.0), judge)


@prop("SCALE-1", premise=SEVERAL_TOKENS, case=lambda scope: cases(scope, context=False, flavours=("normal", "offset")))
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


@prop(
    "SCALE-4",
    premise=ONE_SOFTMAX,
    case=lambda scope: cases(scope, context=True, min_context=1, live=("causal", "self"), poison=(1e4,)),
    needs=("static",),
    weight=0.5,
)
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
    premise=ONE_SOFTMAX,
    case=lambda scope: cases(scope, context=True, min_context=1, flavours=("normal",), far=False, poison=(1e4,)),
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
