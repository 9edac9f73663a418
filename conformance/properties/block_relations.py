"""What holds of a block whether it keeps a cache of its own or shares its layer's: checks that properties share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.properties.block_problems import block_of
from lyra.conformance.properties.test_batch import moved_rows
from lyra.conformance.subject import Subject
from lyra.spec.errors import InputError


def hold_stages(case: Case, judge: Judge) -> None:
    """The trace has the stages of the block, in order; each is right by itself, and the last is what the block gave."""
    problem = case.problem()
    wanted = problem.described.trace_names()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        names = tuple(outcome.trace)
        subject.expect(problem, names == wanted, f"trace {names}, expected {wanted}")
        subject.expect_stages(problem, outcome)
        subject.expect_equal(problem, outcome.trace["output"], outcome.output, "what the block gave")

    judge.each(case, check)


def hold_closed(case: Case, judge: Judge) -> None:
    """Gate 0 gives h to the last bit, the sign of zero included; the gate of the case gives the oracle's values."""
    problem = case.problem()
    h = problem.x.copy()
    h[:, :, 0] = -0.0
    closed = problem.replace(x=h, block=block_of(case).replace(gate=0.0))

    def check(subject: Subject) -> None:
        got = np.asarray(subject.run(closed).output, np.float32)
        same = got[closed.real].tobytes() == h[closed.real].tobytes()
        subject.expect(closed, same, "a closed gate changes bits of the residual stream")
        subject.expect_oracle(problem, subject.run(problem))

    judge.each(case, check)


def hold_cuts(case: Case, judge: Judge) -> None:
    """In one call, in the case's calls and, if these are few, token by token: the same outputs."""
    problem = case.problem()

    def check(subject: Subject) -> None:
        whole = subject.run(problem, (case.tokens,))
        subject.expect_oracle(problem, whole)
        subject.expect_close(problem, subject.run(problem).output, whole.output, "one call")
        if case.tokens <= 7:
            singly = subject.run(problem, (1,) * case.tokens)
            subject.expect_close(problem, singly.output, whole.output, "one call, against token by token")

    judge.each(case, check)


def hold_returned(case: Case, judge: Judge) -> None:
    """A cache that a block gives back serves its layer and the block as it did before, to the bit."""
    problem = case.problem()
    first = case.calls[0]
    head, tail = problem.part(slice(0, first), (first,)), problem.part(slice(first, None), case.calls[1:])
    assert head.own is not None
    assert tail.own is not None

    def check(subject: Subject) -> None:
        given = subject.run(head.own).cache
        untouched = subject.run(tail.own, cache=given).output
        answered = subject.run(head)
        returned = subject.run(tail.own, cache=answered.cache).output
        subject.expect_equal(tail.own, returned, untouched, "the layer by itself")
        again = subject.run(tail.own, cache=given).output
        subject.expect_equal(tail.own, again, untouched, "the layer before the block read its cache")
        subject.expect_oracle(problem, subject.run(problem))

    judge.each(case, check)


def hold_reordered(case: Case, judge: Judge) -> None:
    """Going on from a cache that was cropped and reordered is going on from those rows and tokens."""
    if case.context is not None:
        case = case.replace(context=case.context.replace(batch=1))
    problem = case.problem()
    rows = moved_rows(np.random.default_rng(case.seed).integers(0, case.batch, case.batch))
    first = case.calls[0]
    reordered = problem.replace(x=np.concatenate([problem.x[rows, :first], problem.x[:, first:]], axis=1))

    def check(subject: Subject) -> None:
        layer, long = subject.layer(problem), subject.run(problem)
        cache = layer.reorder(layer.crop(long.cache, first), rows)  # type: ignore[attr-defined]
        rest = subject.run(reordered.part(slice(first, None), case.calls[1:]), cache=cache).output
        joined = np.concatenate([long.output[rows, :first], rest], axis=1)
        subject.expect_close(reordered, joined, subject.run(reordered).output, "these rows from the start")

    judge.each(case, check)


def refuses(subject: Subject, call: Callable[[], object]) -> bool:
    """Whether a call is refused with an InputError. Raises BackendError for another error, Unfit for Unsupported."""

    def refused() -> bool:
        try:
            call()
        except InputError:
            return True
        return False

    return subject.attempt(refused)
