"""Clause IDENTITY: without a context a layer is Hugging Face's Gemma3Attention, whatever the split."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.premises import BEHIND_WINDOW, EMPTY, LYRA_HEADS, SEVERAL_TOKENS
from lyra.conformance.registry import prop
from lyra.conformance.shaped import beyond_window
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject
from lyra.spec.attention import QKNormSpec, RopeSpec

if TYPE_CHECKING:
    from lyra.conformance.oracles.hf import HuggingFaceOracle


@cache
def hugging_face() -> HuggingFaceOracle:
    """Hugging Face's attention, imported where it is asked for: PyTorch with it takes seconds."""
    from lyra.conformance.oracles.hf import HuggingFaceOracle

    return HuggingFaceOracle()


def gemma(case: Case) -> Case:
    """The case as Hugging Face's class can express it: with norm and RoPE, without softcap, finite padding."""
    spec = case.spec
    return case.replace(poison=min(case.poison, 1e3)).respec(
        qk_norm=spec.qk_norm or QKNormSpec(), rope=spec.rope or RopeSpec(), softcap=None
    )


@prop(
    "IDENTITY-1",
    premise=(LYRA_HEADS, SEVERAL_TOKENS),
    case=lambda scope: cases(scope, context=False, live=("causal",)).map(gemma),
    weight=2,
)
def test_equals_hugging_face(case: Case, judge: Judge) -> None:
    """Any split without a context equals the unmodified Gemma3Attention, and Hugging Face equals the oracle."""
    problem = case.problem()
    theirs = hugging_face().plain(
        problem.spec.replace(split=None), problem.weights, problem.x, problem.positions, problem.mask
    )

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect_close(problem, outcome.output, theirs, "Hugging Face's Gemma3Attention")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "IDENTITY-1",
    "SLIDING-1",
    premise=BEHIND_WINDOW,
    case=lambda scope: cases(scope, window=True, padding=False).map(gemma).map(beyond_window(scope)),
)
def test_sliding_layer_equals_hugging_face(case: Case, judge: Judge) -> None:
    """A sliding-window layer equals the unmodified Gemma3Attention with Hugging Face's own sliding mask."""
    problem = case.problem()
    theirs = hugging_face().plain(problem.spec, problem.weights, problem.x, problem.positions, problem.mask)

    def check(subject: Subject) -> None:
        subject.expect_close(problem, subject.run(problem).output, theirs, "Hugging Face's sliding Gemma3Attention")

    judge.each(case, check)


@prop(
    "IDENTITY-2",
    "MASKED-3",
    premise=EMPTY,
    case=lambda scope: cases(scope, context=True, live=("causal",), hidden=False),
    needs=("static",),
)
def test_an_invisible_context_changes_nothing(case: Case, judge: Judge) -> None:
    """A context with every slot masked is no context: the layer falls back to the identity."""
    problem = case.problem()
    assert problem.static is not None
    nothing = problem.replace(static=problem.static._replace(mask=problem.static.mask & False))

    def check(subject: Subject) -> None:
        subject.expect_close(
            problem.replace(static=None).with_split(None),
            subject.run(nothing).output,
            subject.run(problem.replace(static=None).with_split(None)).output,
            "the plain layer",
        )

    judge.each(case, check)
