"""Clause SLIDING: the window reaches over the cache; sliding layers carry no Lyra heads."""

from __future__ import annotations

import numpy as np
import pytest

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.premises import BEHIND_WINDOW, SEVERAL_TOKENS, Premise, several_tokens
from lyra.conformance.registry import prop
from lyra.conformance.shaped import beyond_window, mostly
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject
from lyra.spec.errors import SpecError
from lyra.spec.split import HeadSplit

NARROWEST = Premise(
    "a window of one token among several",
    lambda problem: problem.spec.sliding_window == 1 and several_tokens(problem),
    SEVERAL_TOKENS.tame,
)


@prop(
    "SLIDING-1",
    "LIVE-4",
    premise=BEHIND_WINDOW,
    case=lambda scope: cases(scope, window=True, min_tokens=4).map(mostly(beyond_window(scope))),
    weight=2,
)
def test_window_equals_oracle(case: Case, judge: Judge) -> None:
    """A window shorter and longer than the sequence, in one call and in many: the oracle's values."""
    problem = case.problem()

    def check(subject: Subject) -> None:
        whole = subject.run(problem, (case.tokens,))
        subject.expect_oracle(problem, whole)
        subject.expect_close(problem, subject.run(problem).output, whole.output, "one-shot prefill")

    judge.each(case, check)


@prop(
    "SLIDING-1",
    premise=(BEHIND_WINDOW, NARROWEST),
    case=lambda scope: cases(scope, window=True, min_tokens=3, padding=False, smallest=1),
    weight=0.25,
)
def test_every_width_of_a_window(case: Case, judge: Judge) -> None:
    """Windows of 1 token, of 2, and so on to one more than there are tokens: the oracle's values for each."""
    widths = [case.respec(sliding_window=width).problem() for width in range(1, case.tokens + 2)]

    def check(subject: Subject) -> None:
        for problem in widths:
            subject.expect_oracle(problem, subject.run(problem))

    judge.each(case, check)


@prop(
    "SLIDING-1",
    "POSITION-4",
    premise=BEHIND_WINDOW,
    case=lambda scope: cases(scope, window=True, min_tokens=4, far=False).map(mostly(beyond_window(scope))),
)
def test_window_counts_positions(case: Case, judge: Judge) -> None:
    """Positions with gaps between them: the window reaches back W positions, not W tokens."""
    problem = case.problem()
    steps = np.random.default_rng(case.seed).integers(1, 4, problem.mask.shape) * problem.mask
    gapped = problem.replace(positions=np.maximum(np.cumsum(steps, axis=1) - 1, 0))
    judge.each(case, lambda subject: subject.expect_oracle(gapped, subject.run(gapped)))


@prop(
    "SLIDING-1",
    "MASKED-1",
    premise=BEHIND_WINDOW,
    case=lambda scope: cases(scope, window=True, min_tokens=4, padding=False),
)
def test_keys_behind_the_window_have_no_influence(case: Case, judge: Judge) -> None:
    """Replacing a token by poison changes no bit of the rows W or more behind it."""
    problem = case.respec(sliding_window=2).replace(calls=(case.tokens,)).problem()
    x = problem.x.copy()
    x[:, 0] = 1e6
    poisoned = problem.replace(x=x)

    def check(subject: Subject) -> None:
        clean, other = subject.run(problem), subject.run(poisoned).output
        beyond = problem.replace(mask=problem.mask & (problem.positions >= problem.positions[:, :1] + 2))
        subject.expect_equal(beyond, other, clean.output, "the same rows with another token far behind them")
        subject.expect_oracle(problem, clean)

    judge.each(case, check)


@prop(
    "SLIDING-2",
    premise=BEHIND_WINDOW,
    case=lambda scope: cases(scope, window=True, min_tokens=2).map(beyond_window(scope)),
)
def test_no_lyra_heads_in_a_sliding_layer(case: Case, judge: Judge) -> None:
    """A spec with a window and a split is refused; the window alone is served."""
    with pytest.raises(SpecError, match="carries no Lyra heads"):
        case.respec(split=HeadSplit.all(case.spec))
    judge.oracle(case)
