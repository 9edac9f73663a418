"""Clause SEQUENTIAL: an injected attention block, its gate, its own context, and the cache it may share."""

from __future__ import annotations

import numpy as np
import pytest

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.premises import (
    BEHIND_WINDOW,
    BLOCK_EPS,
    CHUNK_BEHIND,
    CONTEXT,
    GARBAGE,
    HIDDEN,
    LYRA_HEADS,
    MANY_TOKENS,
    OPEN_GATE,
    PADDING,
    ROWS,
    SEVERAL_CALLS,
    SEVERAL_TOKENS,
    Premise,
)
from lyra.conformance.properties.block_problems import (
    alone,
    any_block,
    between_norms,
    block_of,
    decoder_layer,
    with_its_layer,
)
from lyra.conformance.properties.block_relations import (
    hold_closed,
    hold_cuts,
    hold_reordered,
    hold_returned,
    hold_stages,
    refuses,
)
from lyra.conformance.registry import prop
from lyra.conformance.shaped import beyond_window, chunked, several_rows
from lyra.conformance.strategies import block_cases, in_long_calls
from lyra.conformance.subject import Subject
from lyra.spec.errors import SpecError
from lyra.spec.sequential import SequentialSpec
from lyra.spec.split import HeadSplit
from lyra.spec.uncertain import exact, rms_norm

NEEDS = ("sequential", "static", "cache")

NO_OUTER_NORM = Premise(
    "a block without an outer norm",
    lambda problem: problem.block is not None and not problem.block.output_norm,
    lambda case: case if case.block is None else case.replace(block=case.block.replace(output_norm=True)),
)
REFUSED = ("no cache", "a static context", "the cache of other tokens")
REFUSALS = Premise("a call that must be refused", names={"REFUSED": ()})


@prop(
    "SEQUENTIAL-1",
    "SEQUENTIAL-4",
    "TOLERANCE-1",
    premise=(OPEN_GATE, CONTEXT),
    case=any_block,
    needs=NEEDS,
)
def test_block_equals_oracle(case: Case, judge: Judge) -> None:
    """A block around any attention, with and without residual, in any live mode, call by call: the oracle's values."""
    judge.oracle(case)


@prop(
    "SEQUENTIAL-1",
    premise=NO_OUTER_NORM,
    case=lambda scope: block_cases(scope, output_norm=False),
    needs=NEEDS,
    weight=0.25,
)
def test_block_without_an_outer_norm(case: Case, judge: Judge) -> None:
    """Without an output norm the gate multiplies what the attention gives."""
    judge.oracle(case)


@prop(
    "SEQUENTIAL-2",
    premise=BLOCK_EPS,
    case=lambda scope: block_cases(scope, flavours=("small",), far=False),
    needs=NEEDS,
    weight=0.5,
)
def test_eps_decides_small_inputs(case: Case, judge: Judge) -> None:
    """Residual streams so small that norm_eps decides both norms."""
    judge.oracle(case)


@prop(
    "SEQUENTIAL-8",
    "TOLERANCE-2",
    premise=OPEN_GATE,
    case=block_cases,
    needs=(*NEEDS, "trace"),
    weight=0.5,
)
def test_stages_of_a_block(case: Case, judge: Judge) -> None:
    """Every stage of a block is right by itself."""
    hold_stages(case, judge)


@prop(
    "SEQUENTIAL-8",
    "SEQUENTIAL-5",
    premise=(OPEN_GATE, SEVERAL_TOKENS),
    case=lambda scope: block_cases(scope, source="own"),
    needs=(*NEEDS, "trace"),
    weight=0.5,
)
def test_stages_of_a_block_that_shares_its_cache(case: Case, judge: Judge) -> None:
    """Every stage of a block that shares its layer's cache is right by itself; there are none of keys and values."""
    hold_stages(case, judge)


@prop(
    "SEQUENTIAL-3",
    premise=CONTEXT,
    case=lambda scope: block_cases(scope, context=True, min_context=1, residual=(True,)),
    needs=NEEDS,
    weight=0.5,
)
def test_a_closed_gate_gives_the_bits_of_h(case: Case, judge: Judge) -> None:
    """Gate 0 with residual changes no bit, whatever the context holds."""
    hold_closed(case, judge)


@prop(
    "SEQUENTIAL-3",
    "SEQUENTIAL-5",
    premise=OPEN_GATE,
    case=lambda scope: block_cases(scope, source="own", residual=(True,)),
    needs=NEEDS,
    weight=0.25,
)
def test_a_closed_gate_on_a_shared_cache(case: Case, judge: Judge) -> None:
    """Gate 0 with residual changes no bit when the block shares its layer's cache either."""
    hold_closed(case, judge)


@prop(
    "SEQUENTIAL-1",
    "SEQUENTIAL-3",
    premise=SEVERAL_TOKENS,
    case=block_cases,
    needs=NEEDS,
    weight=0.5,
)
def test_block_is_an_attention_between_two_norms(case: Case, judge: Judge) -> None:
    """Without residual and at gate 1 it is the backend's own attention layer, normed before and after."""
    problem = alone(case.problem())
    inner, weights, eps = between_norms(problem), problem.weights, block_of(case).norm_eps

    def check(subject: Subject) -> None:
        attended = subject.run(inner).output
        by_parts = rms_norm(exact(attended), weights["output_norm.weight"], eps).value
        subject.expect_close(problem, subject.run(problem).output, by_parts, "an attention between two norms")

    judge.each(case, check)


@prop("SEQUENTIAL-1", premise=OPEN_GATE, case=block_cases, needs=NEEDS, weight=0.5)
def test_gate_is_a_factor(case: Case, judge: Judge) -> None:
    """What a gate lets through is gate times what gate 1 lets through, on top of h where there is a residual."""
    problem, block = case.problem(), block_of(case)
    base = problem.x.astype(np.float64) if block.residual else 0.0

    def check(subject: Subject) -> None:
        added = block.gate * subject.run(alone(problem)).output.astype(np.float64)
        subject.expect_close(problem, subject.run(problem).output, base + added, "h and gate times the plain block")

    judge.each(case, check)


@prop(
    "SEQUENTIAL-4",
    "LIVE-4",
    premise=CHUNK_BEHIND,
    case=lambda scope: block_cases(scope, min_tokens=2, prefer=chunked),
    needs=NEEDS,
    weight=0.5,
)
def test_calls_of_a_block_may_be_cut_anywhere(case: Case, judge: Judge) -> None:
    """How the tokens of a block are cut into calls has no effect: its own cache serves it as a layer's does."""
    hold_cuts(case, judge)


@prop(
    "SEQUENTIAL-4",
    "LIVE-4",
    premise=MANY_TOKENS,
    case=lambda scope: in_long_calls(block_cases(scope, context=True, live=("self", "causal"), smallest=1)),
    needs=NEEDS,
    weight=0.25,
)
def test_a_cache_of_a_block_grows_with_its_tokens(case: Case, judge: Judge) -> None:
    """Dozens of live tokens, a few at a time: a block's own cache makes room for them as a layer's does."""
    judge.oracle(case)


@prop(
    "SEQUENTIAL-4",
    "BATCH-5",
    premise=ROWS,
    case=lambda scope: block_cases(scope, min_calls=2, padding=False, prefer=several_rows),
    needs=(*NEEDS, "reorder", "crop"),
    weight=0.5,
)
def test_tokens_and_rows_of_the_cache_of_a_block(case: Case, judge: Judge) -> None:
    """Tokens taken back from a block's cache and its rows reordered: going on is going on from those rows."""
    hold_reordered(case, judge)


@prop(
    "SEQUENTIAL-4",
    "MASKED-1",
    premise=(PADDING, HIDDEN, GARBAGE),
    case=lambda scope: block_cases(scope, context=True, min_context=1).map(Case.hiding),
    needs=NEEDS,
    weight=0.5,
)
def test_what_is_hidden_from_a_block_has_no_influence(case: Case, judge: Judge) -> None:
    """Other garbage at padding and in masked static slots changes no bit."""
    problem, other = case.problem(), case.replace(poison=-0.5).problem()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect_equal(problem, subject.run(other).output, outcome.output, "the same with other garbage")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "SEQUENTIAL-5", "TOLERANCE-1", premise=(OPEN_GATE, CONTEXT), case=lambda scope: any_block(scope, "own"), needs=NEEDS
)
def test_shared_cache_equals_oracle(case: Case, judge: Judge) -> None:
    """The block's queries over the keys and values that the layer keeps, whatever its split, mode and context."""
    judge.oracle(case)


@prop(
    "SEQUENTIAL-5",
    "SLIDING-1",
    premise=BEHIND_WINDOW,
    case=lambda scope: block_cases(scope, source="own", window=True, min_tokens=4).map(beyond_window(scope)),
    needs=NEEDS,
    weight=0.25,
)
def test_shared_cache_of_a_window(case: Case, judge: Judge) -> None:
    """In a sliding-window layer the block's queries see what is within the window."""
    judge.oracle(case)


@prop(
    "SEQUENTIAL-5",
    "BATCH-5",
    premise=SEVERAL_CALLS,
    case=lambda scope: block_cases(scope, source="own", min_tokens=4, min_calls=2, padding=False),
    needs=(*NEEDS, "crop"),
    weight=0.5,
)
def test_a_shared_cache_may_be_cropped(case: Case, judge: Judge) -> None:
    """Tokens taken back from a layer's cache are gone for the block that shares it, also where fewer come instead."""
    problem, kept = case.problem(), case.tokens // 2
    assert problem.own is not None
    own, short = problem.own, problem.part([*range(kept), case.tokens - 1], (kept, 1))

    def check(subject: Subject) -> None:
        cropped = subject.layer(own).crop(subject.run(problem).cache, kept)  # type: ignore[attr-defined]
        subject.expect_last(short, subject.run(short.part([kept], (1,)), cache=cropped).output)

    judge.each(case, check)


@prop(
    "SEQUENTIAL-5",
    "LIVE-4",
    premise=CHUNK_BEHIND,
    case=lambda scope: block_cases(scope, source="own", min_tokens=2, prefer=chunked),
    needs=NEEDS,
    weight=0.5,
)
def test_calls_on_a_shared_cache_may_be_cut_anywhere(case: Case, judge: Judge) -> None:
    """How the tokens of layer and block are cut into calls has no effect."""
    hold_cuts(case, judge)


@prop(
    "SEQUENTIAL-5", premise=SEVERAL_TOKENS, case=lambda scope: block_cases(scope, source="own"), needs=NEEDS, weight=0.5
)
def test_own_keys_of_the_block_are_not_read(case: Case, judge: Judge) -> None:
    """Other k and v projections and another k_norm in the block change no bit."""
    problem = case.problem()
    rng = np.random.default_rng(case.seed)
    unread = {name: array for name, array in problem.weights.items() if name.startswith(("k_", "v_"))}
    noise = {name: (1e3 * rng.normal(size=array.shape)).astype(np.float32) for name, array in unread.items()}
    other = problem.replace(weights=problem.weights | noise)

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect_equal(problem, subject.run(other).output, outcome.output, "the block with other k and v")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "SEQUENTIAL-6",
    premise=OPEN_GATE,
    case=lambda scope: block_cases(scope, source="own", min_calls=2),
    needs=NEEDS,
    weight=0.5,
)
def test_a_shared_cache_comes_back_as_it_was(case: Case, judge: Judge) -> None:
    """The layer goes on from the cache that the block returned as from its own, to the bit, and so does the block."""
    hold_returned(case, judge)


@prop(
    "SEQUENTIAL-6",
    premise=REFUSALS,
    case=lambda scope: block_cases(scope, source="own", context=True, min_context=1, min_calls=2, padding=False),
    needs=NEEDS,
    weight=0.25,
)
def test_what_a_shared_cache_excludes_is_refused(case: Case, judge: Judge) -> None:
    """No cache, a static context, a cache without the call's tokens, and Lyra heads in the spec are refused."""
    problem, first = case.problem(), case.calls[0]
    head, tail = problem.part(slice(0, first), (first,)), problem.part(slice(first, None), case.calls[1:])
    assert head.own is not None
    judge.meet(REFUSALS, bool(REFUSED))
    with pytest.raises(SpecError, match="no head goes to Lyra"):
        SequentialSpec(problem.spec.replace(split=HeadSplit.all(problem.spec), sliding_window=None), source="own")

    def check(subject: Subject) -> None:
        layer, cache = subject.layer(problem), subject.run(head.own).cache
        calls = {
            "no cache": lambda: layer(head.x, positions=head.positions),
            "a static context": lambda: layer(head.x, positions=head.positions, static=head.own.static, cache=cache),
            "the cache of other tokens": lambda: layer(tail.x, positions=tail.positions, cache=cache),
        }
        for what in REFUSED:
            subject.expect(problem, refuses(subject, calls[what]), f"{what} was not refused with an InputError")
        subject.expect_oracle(problem, subject.run(problem))

    judge.each(case, check)


@prop(
    "SEQUENTIAL-7",
    premise=(LYRA_HEADS, SEVERAL_TOKENS),
    case=lambda scope: block_cases(scope, context=False, live=("causal",)).map(decoder_layer),
    needs=NEEDS,
)
def test_block_equals_the_attention_half_of_a_decoder_layer(case: Case, judge: Judge) -> None:
    """With its layer's weights, no context and gate 1 it is the attention half of Gemma3DecoderLayer, in any split."""
    problem, layer = with_its_layer(case.problem(), case.seed)
    theirs = layer.attention_half(problem.x)

    def check(subject: Subject) -> None:
        got = subject.run(problem).output
        subject.expect_close(problem, got, theirs, "the attention half of Gemma3DecoderLayer")

    judge.each(case, check)


@prop(
    "SEQUENTIAL-7",
    "SEQUENTIAL-3",
    premise=CONTEXT,
    case=lambda scope: block_cases(scope, context=True, min_context=1).map(decoder_layer),
    needs=NEEDS,
    weight=0.5,
)
def test_a_closed_gate_leaves_a_decoder_layer_alone(case: Case, judge: Judge) -> None:
    """Gemma3DecoderLayer with a block at gate 0 in its place gives the bits that it gives without one."""
    problem, layer = with_its_layer(case.problem(), case.seed)
    plain = layer.whole(problem.x)
    at_its_place = problem.replace(x=layer.attention_half(problem.x))
    closed = at_its_place.replace(block=block_of(case).replace(gate=0.0))

    def check(subject: Subject) -> None:
        output = layer.feed_forward_half(np.asarray(subject.run(closed).output, np.float32))
        subject.expect_equal(closed, output, plain, "Gemma3DecoderLayer without a block")
        subject.expect_oracle(at_its_place, subject.run(at_its_place))

    judge.each(case, check)
