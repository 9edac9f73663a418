"""Clause ROPE: half-split rotation, float32 angles, right at far positions."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from lyra.conformance.case import Case, Problem
from lyra.conformance.judge import Judge
from lyra.conformance.premises import FAR_TOKENS, ROTATED, SEVERAL_TOKENS, Premise, visible_slots
from lyra.conformance.registry import prop
from lyra.conformance.strategies import FAR, cases
from lyra.conformance.subject import Subject
from lyra.spec.attention import RopeSpec


def rotated(case: Case) -> Case:
    """The case with RoPE, whatever its sizes say."""
    return case if case.spec.rope is not None else case.respec(rope=RopeSpec())


def at_the_last(problem: Problem) -> Problem:
    """The problem with every row's last real token at position 131,072, and a context that goes from 0 to there."""
    last = np.where(problem.mask, problem.positions, -1).max(axis=1, keepdims=True)
    positions, static = problem.positions + (FAR - last), problem.static
    if static is not None:
        ends = static.positions.copy()
        ends[:, 0], ends[:, -1] = 0, FAR
        static = static._replace(positions=ends)
    return problem.replace(positions=positions, static=static)


LAST_TOKEN = Premise(
    "a live token at position 131,072",
    lambda problem: bool((problem.positions[problem.mask] == FAR).any()),
    names={"at_the_last": lambda problem: problem},
)
LAST_SLOT = Premise(
    "a static token at position 131,072",
    lambda problem: visible_slots(problem) > 0 and FAR in problem.static.positions[problem.static.mask],
    names={"at_the_last": lambda problem: problem},
)


@prop(
    "ROPE-3",
    "ROPE-2",
    premise=(FAR_TOKENS, SEVERAL_TOKENS),
    case=lambda scope: st.builds(
        lambda case, back: case.replace(start=FAR + 1 - back - case.tokens),
        cases(scope).map(rotated),
        st.integers(0, 99),
    ),
    needs=("static",),
)
def test_far_positions(case: Case, judge: Judge) -> None:
    """Live tokens near position 131,072, with static ones anywhere."""
    judge.oracle(case)


@prop(
    "ROPE-3",
    "POSITION-1",
    "POSITION-2",
    premise=(LAST_TOKEN, LAST_SLOT),
    case=lambda scope: cases(scope, context=True, min_context=2, hidden=False, smallest=1).map(rotated),
    needs=("static",),
    weight=0.5,
)
def test_the_last_position(case: Case, judge: Judge) -> None:
    """A live token and a static one at position 131,072 itself, another static one at 0, prefilled and decoded.

    In "continue" this is as far as POSITION goes: P + t = 262,145, or j - P = -131,073.
    """
    problem = at_the_last(case.problem())

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect_oracle(problem, outcome)
        subject.expect_close(problem, subject.run(problem, (case.tokens,)).output, outcome.output, "decoding it")

    judge.each(case, check)


@prop(
    "ROPE-3",
    "ORDER-3",
    premise=LAST_TOKEN,
    case=lambda scope: cases(scope, context=False, smallest=1).map(rotated),
    needs=("trace",),
    weight=0.3,
)
def test_stages_at_the_last_position(case: Case, judge: Judge) -> None:
    """The traced query and key of position 131,072 are those of the oracle."""
    problem = at_the_last(case.problem())

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        for name in ("q_rope", "k_rope"):
            subject.expect_oracle(problem, outcome, name)

    judge.each(case, check)


@prop(
    "ROPE-1",
    "ROPE-2",
    premise=ROTATED,
    case=lambda scope: cases(scope, context=False, padding=False).map(rotated),
    needs=("trace",),
)
def test_stages_of_the_rotation(case: Case, judge: Judge) -> None:
    """Rotated queries and keys equal the oracle's, element by element: layout, direction, theta and factor."""
    problem = case.problem()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        subject.expect_stages(problem, outcome, ("q_rope", "k_rope"))
        for name in ("q_rope", "k_rope"):
            subject.expect_oracle(problem, outcome, name)

    judge.each(case, check)


@prop(
    "ROPE-2",
    "POSITION-4",
    premise=SEVERAL_TOKENS,
    case=lambda scope: cases(scope, context=False, far=False, padding=False).map(rotated),
)
def test_only_distances_matter(case: Case, judge: Judge) -> None:
    """RoPE is relative: moving every position by 1,000 changes nothing but rounding."""
    problem = case.problem()
    moved = problem.replace(positions=problem.positions + 1000)

    def check(subject: Subject) -> None:
        here, there = subject.run(problem).output, subject.run(moved).output
        subject.expect_close(moved, there, here, "the same tokens 1,000 positions earlier")

    judge.each(case, check)


@prop(
    "ROPE-2",
    premise=SEVERAL_TOKENS,
    case=lambda scope: cases(
        scope, context=False, far=False, min_tokens=4, padding=False, flavours=("normal",), live=("causal",)
    ).map(rotated),
)
def test_distances_do_matter(case: Case, judge: Judge) -> None:
    """Stretching the distances between tokens changes every row that sees more than itself."""
    case = case.respec(rope=RopeSpec(theta=1e4), softcap=None)
    problem = case.problem()
    stretched = problem.replace(positions=problem.positions * 3)

    def check(subject: Subject) -> None:
        near, far = subject.run(problem), subject.run(stretched).output
        later = problem.replace(mask=problem.mask & (problem.positions > problem.positions[:, :1]))
        subject.expect_different(later, far, near.output, "tripling all distances")
        subject.expect_oracle(problem, near)

    judge.each(case, check)
