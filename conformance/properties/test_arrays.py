"""Clause ARRAYS: what is given is read once and never written to, what is returned stays as it is.

A caller that decodes fills the same arrays anew for every token. Here they begin at multiples of 64 bytes, where a
framework may read them in place.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lyra.backends.protocol import Attention
from lyra.conformance.case import Case, Problem
from lyra.conformance.gradients import ask, cotangent_of, hold, wanted_gradients
from lyra.conformance.judge import Judge
from lyra.conformance.premises import CONTEXT, Premise
from lyra.conformance.properties.models import engine, oracle, small_folder, static_of, tokens
from lyra.conformance.registry import prop
from lyra.conformance.strategies import FAR, block_cases, cases
from lyra.conformance.subject import Outcome, Subject
from lyra.spec.attention import StaticSpec
from lyra.spec.inputs import StaticLayer
from lyra.spec.split import HeadSplit

ALIGNMENT = 64
"""Bytes: where an array begins at a multiple of this, JAX reads it where it lies."""

SLOTS = 64
"""Of a context that is attached to a whole model: as many as a backend may pad a short one to, so that it need not."""

SEEDS = 1, 2
"""Of the ids that one array holds, one after the other."""

GARBAGE = 3.0
"""What an array is filled with that its owner has no more use for; any finite number will do."""


def own(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of ALIGNMENT."""
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def handed(problem: Problem) -> Problem:
    """The problem in arrays of the caller's own."""
    static = problem.static
    return problem.replace(
        weights={name: own(array) for name, array in problem.weights.items()},
        x=own(problem.x),
        positions=own(problem.positions),
        mask=own(problem.mask),
        static=None if static is None else StaticLayer(*map(own, static)),
    )


def named(problem: Problem) -> dict[str, np.ndarray]:
    """The arrays that go into a call, by name."""
    static = {} if problem.static is None else {f"static {key}": part for key, part in problem.static._asdict().items()}
    return {"x": problem.x, "positions": problem.positions, "mask": problem.mask, **static}


def fill(mine: Problem, problem: Problem) -> None:
    """Put a problem's values into the arrays that are there."""
    for name, array in named(problem).items():
        named(mine)[name][...] = array


def spoil(arrays: Mapping[str, np.ndarray]) -> None:
    """Write over arrays, those of them that can be written to."""
    for array in arrays.values():
        if array.flags.writeable:
            array[...] = GARBAGE


def others(case: Case) -> tuple[Problem, Problem]:
    """Two problems of the same shapes and weights: nothing else of the one is in the other, positions included."""
    step = 17 if case.start < FAR // 2 else -17
    context = case.context
    if context is not None:
        back = 11 if context.start < FAR // 2 else -11
        context = context.replace(start=max(0, context.start + back), hidden=(context.tokens // 2,) * context.batch)
    other = case.with_other_data(1).replace(start=max(0, case.start + step), context=context, padding=())
    first = case.problem()
    return first, other.problem().replace(weights=first.weights)


def differ(first: Problem, other: Problem) -> bool:
    """Whether a row's context is another one in the other problem."""
    if first.static is None or other.static is None:
        return False
    return not np.array_equal(first.static.v, other.static.v)


OTHER_VALUES = Premise(
    "the same arrays with another context in them", names={"others": lambda case: (case.problem(), case.problem())}
)
OTHER_IDS = Premise("the same array with other ids in it", names={"SEEDS": (1, 1)})


def in_one_call(case: Case) -> Case:
    """The case with all its tokens in a single call."""
    return case.replace(calls=(case.tokens,))


def made(subject: Subject, mine: Problem) -> Attention:
    """A layer whose weights are the caller's again, and nothing of value, once it is made."""
    layer = subject.layer(mine)
    spoil(mine.weights)
    return layer


def held(subject: Subject, layer: Attention, problem: Problem, mine: Problem) -> Outcome:
    """One call with the caller's arrays, filled with a problem's values: the oracle's answer, no array written to."""
    fill(mine, problem)
    outcome = subject.call(layer, problem, mine)
    for name, array in named(problem).items():
        same = np.array_equal(named(mine)[name], array)
        subject.expect(problem, same, f"the call wrote to {name}, an array that it was given")
    subject.expect_oracle(problem, outcome)
    return outcome


def hold_refilled(case: Case, judge: Judge) -> None:
    """One layer, one set of arrays, filled with one input, with another and with the first again."""
    first, other = others(in_one_call(case))
    judge.meet(OTHER_VALUES, differ(first, other))

    def check(subject: Subject) -> None:
        mine = handed(first)
        layer = made(subject, mine)
        for problem in (first, other, first):
            held(subject, layer, problem, mine)

    judge.each(case, check)


@prop(
    "ARRAYS-1",
    "ARRAYS-2",
    "STATIC-5",
    premise=(OTHER_VALUES, CONTEXT),
    case=lambda scope: cases(scope, context=True, min_context=2, smallest=1).map(Case.hiding),
    needs=("static",),
    weight=0.25,
)
def test_arrays_filled_anew_are_read_anew(case: Case, judge: Judge) -> None:
    """Weights overwritten once the layer is made, all other arrays filled anew between calls, and none written to."""
    hold_refilled(case, judge)


@prop(
    "ARRAYS-1",
    "ARRAYS-2",
    premise=OTHER_VALUES,
    case=lambda scope: block_cases(scope, context=True, min_context=2, smallest=1).map(Case.hiding),
    needs=("sequential", "static"),
    weight=0.15,
)
def test_blocks_read_their_arrays_anew(case: Case, judge: Judge) -> None:
    """The same for injected blocks."""
    hold_refilled(case, judge)


@prop(
    "ARRAYS-1",
    "ARRAYS-3",
    "STATIC-5",
    premise=OTHER_VALUES,
    case=lambda scope: cases(scope, context=True, min_context=2, smallest=1, padding=False),
    needs=("static", "cache"),
    weight=0.25,
)
def test_decoding_with_one_array(case: Case, judge: Judge) -> None:
    """Token after token in one array, the context exchanged in its own half way: each output is right, and stays."""
    first, other = others(case)
    other = first.replace(static=other.static)
    judge.meet(OTHER_VALUES, differ(first, other))

    def check(subject: Subject) -> None:
        mine = handed(first.part([0], (1,)))
        layer, cache = made(subject, mine), None
        kept, copies = [], []
        for token in range(case.tokens):
            whole = (first, other)[token >= case.tokens // 2]
            fill(mine, part := whole.part([token], (1,)))
            outcome = subject.call(layer, part, mine, cache=cache)
            cache = outcome.cache
            subject.expect_last(whole.part(slice(0, token + 1), (token + 1,)), outcome.output)
            kept.append(outcome.output)
            copies.append(outcome.output.copy())
        same = all(map(np.array_equal, kept, copies))
        subject.expect(first, same, "a call changed an output that an earlier one had returned")

    judge.each(case, check)


@prop(
    "ARRAYS-3",
    premise=OTHER_VALUES,
    case=lambda scope: cases(scope, context=True, min_context=2, min_tokens=2, smallest=1, padding=False),
    needs=("static", "cache", "trace"),
    weight=0.25,
)
def test_what_is_returned_is_the_callers(case: Case, judge: Judge) -> None:
    """Output and trace stay as they are in later calls, and writing to them changes none of these."""
    former, other = others(case)
    judge.meet(OTHER_VALUES, differ(former, other))
    head, last = slice(0, case.tokens - 1), slice(case.tokens - 1, None)
    prompts = [problem.part(head, (case.tokens - 1,)) for problem in (former, other)]

    def check(subject: Subject) -> None:
        layer = subject.layer(former)
        first = subject.call(layer, prompts[0], prompts[0], trace=True)
        before = {name: array.copy() for name, array in returned(first).items()}
        second = subject.call(layer, prompts[1], prompts[1], trace=True)
        for name, array in returned(first).items():
            same = np.array_equal(array, before[name])
            subject.expect(former, same, f"a call changed {name}, which an earlier one had returned")
        subject.expect_oracle(prompts[0], first)
        subject.expect_oracle(prompts[1], second)
        for problem, outcome in ((former, first), (other, second)):
            spoil(returned(outcome))
            token = problem.part(last, (1,))
            subject.expect_last(problem, subject.call(layer, token, token, cache=outcome.cache).output)

    judge.each(case, check)


def returned(outcome: Outcome) -> dict[str, np.ndarray]:
    """The arrays that a call returned, by name."""
    return {"the output": outcome.output, **{f"stage {name}": array for name, array in outcome.trace.items()}}


@prop(
    "ARRAYS-1",
    "ARRAYS-2",
    "ARRAYS-3",
    "GRAD-1",
    premise=OTHER_VALUES,
    case=lambda scope: cases(scope, context=True, min_context=2, smallest=1).map(Case.hiding),
    needs=("grad", "static"),
    weight=0.15,
)
def test_gradients_of_arrays_filled_anew(case: Case, judge: Judge) -> None:
    """Gradients in arrays filled anew are those of what the arrays hold now; those returned before stay."""
    case = in_one_call(case)
    first, other = others(case)
    judge.meet(OTHER_VALUES, differ(first, other))
    cotangents = [cotangent_of(case), cotangent_of(case.with_other_data(1))]
    wanted = [wanted_gradients(problem, given) for problem, given in zip((first, other), cotangents, strict=True)]

    def check(subject: Subject) -> None:
        mine, given = handed(first), own(cotangents[0])
        layer = made(subject, mine)
        kept = []
        for problem, cotangent in zip((first, other), cotangents, strict=True):
            fill(mine, problem)
            given[...] = cotangent
            kept.append(ask(subject, problem, given, layer, mine))
            same = all(np.array_equal(named(mine)[name], array) for name, array in named(problem).items())
            subject.expect(problem, same and np.array_equal(given, cotangent), "vjp wrote to an array it was given")
        for problem, got, expected in zip((first, other), kept, wanted, strict=True):
            hold(subject, problem, got, expected)

    judge.each(case, check)


@prop("ARRAYS-1", "ARRAYS-2", "ARRAYS-3", "CAPTURE-3", premise=OTHER_IDS, needs=("model",))
def test_a_model_keeps_what_it_attached(judge: Judge) -> None:
    """A model's context is its own once it is attached, ids are read anew, and what it returned can be written to."""
    judged = oracle(small_folder())
    layers = judged.spec.global_layers
    captured = judged.capture(tokens(SLOTS), layers)
    split = HeadSplit.last_kv(judged.spec.attention, 1)
    contexts = {layer: static_of(captured, layer, split.lyra_kv_heads) for layer in layers}
    shown = contexts[layers[0]].mask.copy()
    shown[:, ::5] = False
    contexts[layers[0]] = contexts[layers[0]]._replace(mask=shown)
    mode, splits = StaticSpec(), dict.fromkeys(layers, split)
    inputs = [tokens(11, seed=seed, rows=2) for seed in SEEDS]
    judge.meet(OTHER_IDS, not np.array_equal(*inputs))
    wanted = [judged.logits_with(ids, contexts, splits, mode) for ids in inputs]

    def check(subject: Subject) -> None:
        loaded = engine(subject, small_folder())
        mine = {layer: StaticLayer(*map(own, static)) for layer, static in contexts.items()}
        subject.attempt(lambda: loaded.attach(mine, splits, mode))
        for layer, static in mine.items():
            same = all(map(np.array_equal, static, contexts[layer]))
            subject.expect(None, same, f"attaching wrote to the context of layer {layer}, an array that it was given")
            spoil(static._asdict())
        ids, kept = own(inputs[0]), []
        for given in inputs:
            ids[...] = given
            kept.append(subject.attempt(lambda: loaded.logits(ids)))
        for got, expected in zip(kept, wanted, strict=True):
            subject.expect_model(got, expected, "logits behind a context that is overwritten", "the oracle's model")
        spoil({"logits": kept[1]})
        again = subject.attempt(lambda: loaded.logits(ids))
        subject.attempt(loaded.detach)
        subject.expect_model(again, wanted[1], "logits after the last ones were written to", "the oracle's model")

    judge.each(f"{SLOTS} slots, {mode}", check)
