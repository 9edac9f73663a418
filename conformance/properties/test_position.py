"""Clause POSITION: where static and live tokens sit for the two kinds of heads."""

from __future__ import annotations

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.premises import CONTINUE, OVERLAY, PADDING, SEVERAL_SLOTS
from lyra.conformance.properties.test_rope import rotated
from lyra.conformance.registry import prop
from lyra.conformance.shaped import beside_vanilla, padded
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject


@prop(
    "POSITION-1",
    "POSITION-3",
    premise=CONTINUE,
    case=lambda scope: (
        cases(scope, context=True, min_context=1, positions=("continue",)).map(rotated).map(beside_vanilla(scope))
    ),
    needs=("static",),
    weight=2,
)
def test_continue(case: Case, judge: Judge) -> None:
    """positions="continue": the Lyra stream's live tokens follow the highest visible static position, row by row."""
    judge.oracle(case)


@prop(
    "POSITION-2",
    "POSITION-3",
    premise=OVERLAY,
    case=lambda scope: (
        cases(scope, context=True, min_context=1, positions=("overlay",)).map(rotated).map(beside_vanilla(scope))
    ),
    needs=("static",),
)
def test_overlay(case: Case, judge: Judge) -> None:
    """positions="overlay": live tokens of the Lyra stream stay at t."""
    judge.oracle(case)


@prop(
    "POSITION-1",
    "STORED-2",
    premise=CONTINUE,
    case=lambda scope: cases(scope, context=True, min_context=1, positions=("continue",), far=False).map(rotated),
    needs=("static",),
)
def test_continue_follows_the_context(case: Case, judge: Judge) -> None:
    """Moving the whole context by 1,000 positions moves the Lyra stream with it: nothing changes but rounding."""
    problem = case.problem()
    assert problem.static is not None
    moved = problem.replace(static=problem.static._replace(positions=problem.static.positions + 1000))

    def check(subject: Subject) -> None:
        here, there = subject.run(problem).output, subject.run(moved).output
        subject.expect_close(moved, there, here, "the context 1,000 positions earlier")

    judge.each(case, check)


@prop(
    "POSITION-2",
    "POSITION-1",
    premise=(OVERLAY, SEVERAL_SLOTS),
    case=lambda scope: cases(
        scope,
        context=True,
        min_context=3,
        positions=("overlay",),
        live=("none",),
        far=False,
        hidden=False,
        padding=False,
        flavours=("normal",),
    ).map(rotated),
    needs=("static",),
)
def test_overlay_does_not_follow(case: Case, judge: Judge) -> None:
    """In "overlay" moving the context changes every row; in "continue" it does not."""
    case = case.respec(static=case.spec.static.replace(live="none", positions="overlay"), softcap=None)
    problem = case.problem()
    assert problem.static is not None
    moved = problem.replace(static=problem.static._replace(positions=problem.static.positions + 7))

    def check(subject: Subject) -> None:
        first, second = subject.run(problem), subject.run(moved).output
        subject.expect_different(problem, second, first.output, "moving an overlaid context by 7 positions")
        subject.expect_oracle(problem, first)

    judge.each(case, check)


@prop(
    "POSITION-2",
    "ROPE-2",
    premise=OVERLAY,
    case=lambda scope: cases(scope, context=True, min_context=1, positions=("overlay",), far=False).map(rotated),
    needs=("static",),
    weight=0.5,
    profile="ci",
)
def test_overlay_keeps_its_distances(case: Case, judge: Judge) -> None:
    """In "overlay", moving static and live tokens together by 1,000 positions changes nothing but rounding."""
    problem = case.problem()
    assert problem.static is not None
    static = problem.static._replace(positions=problem.static.positions + 1000)
    moved = problem.replace(positions=problem.positions + 1000, static=static)

    def check(subject: Subject) -> None:
        here, there = subject.run(problem).output, subject.run(moved).output
        subject.expect_close(moved, there, here, "all tokens 1,000 positions earlier")

    judge.each(case, check)


@prop(
    "POSITION-4",
    premise=PADDING,
    case=lambda scope: cases(scope, far=False, min_tokens=2).map(padded),
    needs=("static",),
)
def test_padding_does_not_count(case: Case, judge: Judge) -> None:
    """Left padding moves nothing: a padded row equals the row without its padding."""
    count = min(max(case.padding, default=0), case.tokens - 1)
    case = case.replace(padding=(count,) * case.batch, padding_side="left", calls=(case.tokens,))
    problem = case.problem()
    bare = problem.replace(
        x=problem.x[:, count:],
        positions=problem.positions[:, count:],
        mask=problem.mask[:, count:],
        calls=(case.tokens - count,),
    )

    def check(subject: Subject) -> None:
        padded = subject.run(problem).output[:, count:]
        subject.expect_close(bare, padded, subject.run(bare).output, "the row without padding")

    judge.each(case, check)
