"""Clause STATIC: one softmax over static and live keys; the static part is never causal."""

from __future__ import annotations

import numpy as np

from lyra.conformance import tame
from lyra.conformance.case import Case, Problem
from lyra.conformance.judge import Judge
from lyra.conformance.premises import (
    CAUSAL,
    CONTEXT,
    ONE_SOFTMAX,
    SEVERAL_SLOTS,
    SEVERAL_TOKENS,
    Premise,
    visible_slots,
)
from lyra.conformance.properties.test_identity import gemma, hugging_face
from lyra.conformance.registry import prop
from lyra.conformance.shaped import cutting, often
from lyra.conformance.strategies import FAR, cases
from lyra.conformance.subject import Subject, expected
from lyra.conformance.tolerance import K_PAIR
from lyra.spec.attention import Live
from lyra.spec.inputs import StaticLayer
from lyra.spec.split import HeadSplit

STATIC_ALONE = Premise(
    "Lyra heads that see static keys only",
    lambda problem: visible_slots(problem) > 0 and problem.spec.static.live == "none",
    lambda case: case.respec(static=case.spec.static.replace(live="causal")),
)

PREFIX = Premise("a prefix as context, and tokens behind it", ONE_SOFTMAX.holds, tame.no_token)

SLOT_AXES = (2, 2, 1, 1)
"""Where the slots are in each array of a StaticLayer."""


@prop(
    "STATIC-1",
    "STATIC-2",
    "STATIC-3",
    "LIVE-1",
    premise=(ONE_SOFTMAX, CAUSAL),
    case=lambda scope: cases(scope, context=True, live=("causal",)),
    needs=("static",),
    weight=3,
)
def test_one_softmax_over_static_and_live(case: Case, judge: Judge) -> None:
    """Lyra heads attend to static and live keys together, as the oracle does."""
    judge.oracle(case)


@prop(
    "STATIC-1",
    "SPLIT-2",
    "LIVE-2",
    "LIVE-3",
    "POSITION-1",
    "POSITION-2",
    premise=CONTEXT,
    case=lambda scope: cases(scope, context=True, poison=(1e2,)).map(gemma).map(often(cutting(scope))),
    needs=("static",),
    weight=2,
)
def test_equals_hugging_face_per_head(case: Case, judge: Judge) -> None:
    """Splits with contexts, in every mode, equal Hugging Face's own attention run with a mask per head."""
    problem = case.problem()
    unmodified = hugging_face().attention(problem.spec, problem.weights)
    theirs = unmodified(problem.x, positions=problem.positions, mask=problem.mask, static=problem.static).output

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect_close(problem, outcome.output, theirs, "Hugging Face's attention, masked per head")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "STATIC-2",
    premise=(CONTEXT, SEVERAL_TOKENS),
    case=lambda scope: cases(
        scope,
        context=True,
        min_context=1,
        min_tokens=2,
        padding=False,
        hidden=False,
        flavours=("normal",),
        live=("none",),
        positions=("overlay",),
    ),
    needs=("static", "trace"),
)
def test_the_static_part_is_never_causal(case: Case, judge: Judge) -> None:
    """Every live token sees every static token: equal queries give equal rows, the first token's like the last's."""
    case = case.respec(rope=None, static=case.spec.static.replace(live="none"))
    problem = case.problem()
    problem = problem.replace(x=np.repeat(problem.x[:, :1], problem.x.shape[1], axis=1))
    lyra = list(problem.spec.lyra_q_heads)

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        heads = outcome.trace["heads"][:, :, lyra].astype(np.float64)
        sigma = expected(problem)["heads"].sigma[:, :, lyra]
        off = (np.abs(heads - heads[:, :1]) > K_PAIR * sigma)[problem.real]
        subject.expect(problem, not off.any(), "equal live tokens saw different parts of the context")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "STATIC-2",
    "STATIC-3",
    premise=SEVERAL_SLOTS,
    case=lambda scope: cases(
        scope, context=True, min_context=1, hidden=False, flavours=("normal",), live=("none",), positions=("overlay",)
    ),
    needs=("static",),
)
def test_every_static_token_counts(case: Case, judge: Judge) -> None:
    """Changing the value of any one visible static token changes every row; so does its key, if there are others."""
    problem = with_queries_ending_in_one(case.respec(static=case.spec.static.replace(live="none")))
    static = problem.static
    assert static is not None
    slots = static.mask.shape[1]
    slot = case.seed % slots
    v = static.v.copy()
    v[:, :, slot] += slots  # adds 1 to every Lyra head: like the others in size, as σ takes what is summed to be
    problem = problem.replace(static=static._replace(k=np.zeros_like(static.k)))
    changed = problem.replace(static=static._replace(k=np.zeros_like(static.k), v=v))
    turned = changed.replace(static=with_score_added(changed, slot, 1.0))

    def check(subject: Subject) -> None:
        first, second = subject.run(problem), subject.run(changed).output
        subject.expect_different(problem, second, first.output, f"the value of static token {slot}")
        if slots > 1:
            subject.expect_different(changed, subject.run(turned).output, second, f"the key of static token {slot}")
        subject.expect_oracle(problem, first)

    judge.each(case, check)


@prop(
    "STATIC-4",
    "STATIC-3",
    premise=SEVERAL_SLOTS,
    case=lambda scope: cases(scope, context=True, min_context=2),
    needs=("static",),
)
def test_a_context_may_be_permuted_and_padded(case: Case, judge: Judge) -> None:
    """The order of static slots is nothing, their positions are everything; masked slots in between change nothing."""
    problem = case.problem()
    static = problem.static
    assert static is not None
    rows, slots = static.mask.shape
    rng = np.random.default_rng(case.seed)
    kv = np.full((rows, static.k.shape[1], 3, static.k.shape[3]), case.poison, dtype=np.float32)
    hidden = StaticLayer(kv, -kv, np.zeros((rows, 3), dtype=bool), rng.integers(0, FAR, (rows, 3)))
    order = rng.permutation(slots + 3)
    shuffled = slots_of(joined(static, hidden), order)

    def check(subject: Subject) -> None:
        whole = subject.run(problem).output
        subject.expect_close(
            problem, subject.run(problem.replace(static=shuffled)).output, whole, "the context in its order"
        )

    judge.each(case, check)


def joined(first: StaticLayer, other: StaticLayer) -> StaticLayer:
    """The slots of one context and then those of another; positions stay."""
    parts = zip(first, other, SLOT_AXES, strict=True)
    return StaticLayer(*(np.concatenate([a, b], axis=axis) for a, b, axis in parts))


def slots_of(static: StaticLayer, slots: np.ndarray | slice) -> StaticLayer:
    """Some slots of a context, in the order given."""
    return StaticLayer(static.k[:, :, slots], static.v[:, :, slots], static.mask[:, slots], static.positions[:, slots])


@prop(
    "STATIC-4",
    "STATIC-1",
    premise=SEVERAL_SLOTS,
    case=lambda scope: cases(scope, context=True, min_context=2, hidden=False, live=("none",), positions=("overlay",)),
    needs=("static", "trace"),
    weight=0.5,
    profile="ci",
)
def test_parts_of_a_context_merge(case: Case, judge: Judge) -> None:
    """A context cut in two, each part attended to by itself, merged by the weights of both: the whole one."""
    case = case.respec(static=case.spec.static.replace(live="none", positions="overlay"))
    problem = case.problem()
    static = problem.static
    assert static is not None
    slots = static.mask.shape[1]
    cut = 1 + case.seed % (slots - 1)
    first, second = slots_of(static, slice(cut)), slots_of(static, slice(cut, None))
    marks = np.broadcast_to(np.arange(slots)[:, None] < cut, static.v.shape)
    lyra = np.isin(np.arange(problem.spec.num_attention_heads), problem.spec.lyra_q_heads)[:, None]

    def check(subject: Subject) -> None:
        def heads(context: StaticLayer) -> np.ndarray:
            return subject.run(problem.replace(static=context), trace=True).trace["heads"].astype(np.float64)

        # Each part's weight, in every element of a head. 1 minus the one would be a poor value of a tiny other.
        weights = (heads(static._replace(v=mark.astype(np.float32))) for mark in (marks, ~marks))
        merged = sum(weight * heads(part) for weight, part in zip(weights, (first, second), strict=True))
        whole = heads(static)
        subject.expect_close(problem, np.where(lyra, merged, whole), whole, "the whole context", "heads")

    judge.each(case, check)


@prop(
    "STATIC-1",
    "STATIC-4",
    premise=CONTEXT,
    case=lambda scope: cases(
        scope, context=True, min_context=1, hidden=False, positions=("overlay",), flavours=("normal",)
    ),
    needs=("static",),
    weight=0.5,
    profile="ci",
)
def test_a_key_given_twice_weighs_ln_2_more(case: Case, judge: Judge) -> None:
    """A static token given twice equals that token once with ln 2 added to its score, beside all other keys."""
    problem = with_queries_ending_in_one(case)
    static = problem.static
    assert static is not None
    slot = case.seed % static.mask.shape[1]
    heavier = problem.replace(static=with_score_added(problem, slot, np.log(2)))
    twice = problem.replace(static=joined(static, slots_of(static, slice(slot, slot + 1))))

    def check(subject: Subject) -> None:
        subject.expect_close(
            twice, subject.run(twice).output, subject.run(heavier).output, f"slot {slot} once, ln 2 heavier"
        )

    judge.each(case, check)


def with_queries_ending_in_one(case: Case) -> Problem:
    """The case without norm and RoPE, its queries ending in a 1: the last element of a key adds to its score."""
    problem = case.respec(qk_norm=None, rope=None, softcap=None, bias=True).problem()
    weight, bias = problem.weights["q_proj.weight"], problem.weights["q_proj.bias"]
    last = np.arange(len(bias)) % case.spec.head_dim == case.spec.head_dim - 1
    ends = {
        "q_proj.weight": np.where(last[:, None], np.float32(0), weight),
        "q_proj.bias": np.where(last, np.float32(1), bias),
    }
    return problem.replace(weights=problem.weights | ends)


def with_score_added(problem: Problem, slot: int, score: float) -> StaticLayer:
    """The context with something added to the score of one slot, where queries end in a 1."""
    assert problem.static is not None
    k = problem.static.k.copy()
    k[:, :, slot, -1] += np.float32(score / problem.spec.scale)
    return problem.static._replace(k=k)


@prop(
    "STATIC-4",
    premise=(CONTEXT, ONE_SOFTMAX, STATIC_ALONE),
    case=lambda scope: cases(scope, context=True, min_context=1, hidden=False, positions=("overlay",)),
    needs=("static",),
)
def test_a_doubled_context_weighs_twice(case: Case, judge: Judge) -> None:
    """A context given twice equals the oracle's, and without live keys it equals the context given once."""
    live: Live = "none" if case.seed % 2 else "causal"  # with the data: each example has both
    problem = case.respec(static=case.spec.static.replace(live=live)).problem()
    static = problem.static
    assert static is not None
    doubled = problem.replace(static=joined(static, static))

    def check(subject: Subject) -> None:
        twice = subject.run(doubled)
        subject.expect_oracle(doubled, twice)
        if problem.spec.static.live == "none":
            subject.expect_close(problem, twice.output, subject.run(problem).output, "the context given once")

    judge.each(case, check)


@prop(
    "STATIC-1",
    "POSITION-1",
    "COMPOSE-1",
    premise=PREFIX,
    case=lambda scope: cases(scope, context=False, min_tokens=2, padding=False, live=("causal",)),
    needs=("static", "trace"),
)
def test_a_context_equals_the_same_tokens_as_prefix(case: Case, judge: Judge) -> None:
    """All heads to Lyra, the context being a layer's own keys and values: the layer over prefix and rest together."""
    case = case.respec(
        split=HeadSplit.all(case.spec), static=case.spec.static.replace(live="causal", positions="continue")
    ).replace(start=0)
    whole = case.replace(calls=(case.tokens,)).problem()
    cut = case.tokens // 2
    name = "k_norm" if case.spec.qk_norm is not None else "k_proj"

    def check(subject: Subject) -> None:
        full = subject.run(whole, trace=True)
        prefix = {stage: full.trace[stage][:, :cut].swapaxes(1, 2) for stage in (name, "v_proj")}
        rest = whole.replace(
            x=whole.x[:, cut:],
            positions=whole.positions[:, cut:] - cut,
            mask=whole.mask[:, cut:],
            calls=(case.tokens - cut,),
            static=StaticLayer(prefix[name], prefix["v_proj"], whole.mask[:, :cut], whole.positions[:, :cut]),
        )
        subject.expect_close(rest, subject.run(rest).output, full.output[:, cut:], "the same tokens as ordinary prefix")

    judge.each(case, check)
