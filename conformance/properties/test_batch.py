"""Clause BATCH: rows are independent; a context serves all of them or each its own."""

from __future__ import annotations

import numpy as np

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.premises import CONTEXT, LENGTHS, ROWS, SHARED_CONTEXT, TEXT_LENGTHS
from lyra.conformance.registry import prop
from lyra.conformance.shaped import padded, several_rows
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject
from lyra.spec.inputs import StaticLayer


def moved_rows(rows: np.ndarray) -> np.ndarray:
    """An order of rows that leaves them not all where they are: these, or the rows backwards."""
    ordered = np.arange(len(rows))
    return ordered[::-1].copy() if np.array_equal(rows, ordered) else rows


@prop(
    "BATCH-1",
    premise=SHARED_CONTEXT,
    case=lambda scope: cases(scope, context=True, min_context=1, prefer=several_rows),
    needs=("static",),
)
def test_a_shared_context_serves_every_row(case: Case, judge: Judge) -> None:
    """A context of batch 1 gives what the same context repeated for every row gives."""
    assert case.context is not None
    case = case.replace(context=case.context.replace(batch=1))
    problem = case.problem()
    static = problem.static
    assert static is not None
    repeated = StaticLayer(*(np.repeat(part, case.batch, axis=0) for part in static))

    def check(subject: Subject) -> None:
        shared = subject.run(problem)
        subject.expect_oracle(problem, shared)
        own = subject.run(problem.replace(static=repeated)).output
        subject.expect_close(problem, own, shared.output, "the shared context")

    judge.each(case, check)


@prop("BATCH-2", premise=ROWS, case=lambda scope: cases(scope, prefer=several_rows), needs=("static",))
def test_permuting_rows_permutes_the_output(case: Case, judge: Judge) -> None:
    """Rows know nothing of each other: permuting them all permutes the output (matrix kernels may round the last rows
    of a batch another way, so not to the bit)."""
    problem = case.problem()
    order = moved_rows(np.random.default_rng(case.seed).permutation(case.batch))
    static = problem.static
    if static is not None and static.k.shape[0] == case.batch:
        static = StaticLayer(*(part[order] for part in static))
    permuted = problem.replace(
        x=problem.x[order], positions=problem.positions[order], mask=problem.mask[order], static=static
    )

    def check(subject: Subject) -> None:
        subject.expect_close(
            permuted, subject.run(permuted).output, subject.run(problem).output[order], "the rows in their first order"
        )

    judge.each(case, check)


@prop(
    "BATCH-3",
    "BATCH-1",
    "POSITION-1",
    premise=(LENGTHS, TEXT_LENGTHS),
    case=lambda scope: cases(scope, context=True, min_context=1, prefer=several_rows).map(padded),
    needs=("static",),
    weight=2,
)
def test_rows_of_different_lengths(case: Case, judge: Judge) -> None:
    """Each row alone gives what it gives in the batch: its own context length, padding and P."""
    assert case.context is not None
    rows = case.batch
    tokens = case.context.tokens
    hidden = tuple((case.seed + row) % (tokens + 1) for row in range(rows))
    case = case.replace(context=case.context.replace(batch=rows, hidden=hidden))
    problem = case.problem()
    assert problem.static is not None
    row = case.seed % rows
    alone = problem.replace(
        x=problem.x[row : row + 1],
        positions=problem.positions[row : row + 1],
        mask=problem.mask[row : row + 1],
        static=StaticLayer(*(part[row : row + 1] for part in problem.static)),
    )

    def check(subject: Subject) -> None:
        together = subject.run(problem)
        subject.expect_oracle(problem, together)
        single = subject.run(alone).output
        subject.expect_close(alone, single, together.output[row : row + 1], f"row {row} within its batch")

    judge.each(case, check)


@prop(
    "BATCH-5",
    premise=(ROWS, SHARED_CONTEXT),
    case=lambda scope: cases(scope, context=True, min_context=1, min_calls=2, padding=False, prefer=several_rows),
    needs=("static", "cache", "reorder"),
)
def test_reordering_the_cache(case: Case, judge: Judge) -> None:
    """Reordering the rows of a live cache, as a beam search does, is reordering the rows of the first call."""
    assert case.context is not None
    case = case.replace(context=case.context.replace(batch=1))
    problem = case.problem()
    rows = moved_rows(np.random.default_rng(case.seed).integers(0, case.batch, case.batch))
    first = case.calls[0]
    reordered = problem.replace(x=np.concatenate([problem.x[rows, :first], problem.x[:, first:]], axis=1))

    def check(subject: Subject) -> None:
        begun = subject.run(problem.part(slice(0, first), (first,)))
        cache = subject.layer(problem).reorder(begun.cache, rows)  # type: ignore[attr-defined]
        rest = reordered.part(slice(first, None), case.calls[1:])
        went_on = subject.run(rest, cache=cache).output
        subject.expect_close(
            reordered,
            np.concatenate([begun.output[rows], went_on], axis=1),
            subject.run(reordered).output,
            "rows in that order from the start",
        )

    judge.each(case, check)


@prop(
    "BATCH-5",
    premise=CONTEXT,
    case=lambda scope: cases(scope, context=True, min_context=1, min_calls=2, padding=False),
    needs=("static", "cache", "crop"),
)
def test_cropping_the_cache(case: Case, judge: Judge) -> None:
    """Cropping takes tokens back, or none: going on is going on from the shorter cache, and the longer one stays."""
    problem = case.problem()
    first, end = case.calls[0], case.tokens - 1
    rest, last = problem.part(slice(first, None), case.calls[1:]), problem.part(slice(end, None), (1,))
    before = problem.part(slice(0, end), (first, end - first) if first < end else (end,))

    def check(subject: Subject) -> None:
        layer = subject.layer(problem)
        long = subject.run(problem)
        whole = layer.crop(long.cache, problem.x.shape[1])  # type: ignore[attr-defined]
        cropped = layer.crop(whole, first)  # type: ignore[attr-defined]
        again = subject.run(rest, cache=cropped).output
        subject.expect_close(
            problem, np.concatenate([long.output[:, :first], again], axis=1), long.output, "the first continuation"
        )
        longer = subject.run(before).cache
        subject.run(rest.replace(x=-rest.x), cache=layer.crop(longer, first))  # type: ignore[attr-defined]
        subject.expect_last(problem, subject.run(last, cache=longer).output)

    judge.each(case, check)
