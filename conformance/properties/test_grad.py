"""Clause GRAD: gradients with respect to inputs, weights, static keys and values."""

from __future__ import annotations

import numpy as np

from lyra.conformance.case import Case, Problem
from lyra.conformance.gradients import Answers, agree, ask, cotangent_of, hold, wanted_gradients
from lyra.conformance.judge import Judge
from lyra.conformance.premises import BEHIND_WINDOW, CONTEXT, GARBAGE, HIDDEN, ONE_SLOT, PADDING, SEVERAL_TOKENS
from lyra.conformance.registry import prop
from lyra.conformance.shaped import beyond_window
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject
from lyra.spec.uncertain import Uncertain

LONGEST = 6
"""Tokens of a call whose gradients are asked for. Compiling a backward pass takes seconds, so the shapes are few."""


def in_one_call(case: Case) -> Case:
    """The case's first tokens in a single call: gradients do not flow through a cache."""
    tokens = min(case.tokens, LONGEST)
    return case.replace(calls=(tokens,), padding=tuple(min(count, tokens - 1) for count in case.padding))


def hold_to_the_oracle(case: Case, judge: Judge) -> None:
    """Every gradient of every backend within K·σ of the oracle's, any two backends within K·√2·σ of each other."""
    problem, cotangent = case.problem(), cotangent_of(case)
    wanted = wanted_gradients(problem, cotangent)
    answers: Answers = {}

    def check(subject: Subject) -> None:
        got = ask(subject, problem, cotangent)
        hold(subject, problem, got, wanted)
        answers[subject.name] = got

    judge.each(case, check)
    agree(judge, case, problem, answers, wanted)


@prop(
    "GRAD-1",
    "TOLERANCE-1",
    premise=CONTEXT,
    case=lambda scope: cases(scope, context=True).map(in_one_call),
    needs=("grad", "static"),
    weight=0.5,
)
def test_gradients_with_a_context(case: Case, judge: Judge) -> None:
    """Gradients of inputs, weights, static keys and values, in every mode, for any split."""
    hold_to_the_oracle(case, judge)


@prop(
    "GRAD-1",
    premise=SEVERAL_TOKENS,
    case=lambda scope: cases(scope, context=False).map(in_one_call),
    needs=("grad",),
    weight=0.3,
)
def test_gradients_without_a_context(case: Case, judge: Judge) -> None:
    """Gradients of inputs and weights without a context, in every mode; none come back for static keys and values."""
    hold_to_the_oracle(case, judge)


@prop(
    "GRAD-1",
    "SLIDING-1",
    premise=BEHIND_WINDOW,
    case=lambda scope: cases(scope, window=True).map(in_one_call).map(beyond_window(scope)),
    needs=("grad",),
    weight=0.3,
    profile="ci",
)
def test_gradients_of_a_sliding_window_layer(case: Case, judge: Judge) -> None:
    """Gradients reach back as far as the window, no farther."""
    hold_to_the_oracle(case, judge)


@prop(
    "GRAD-2",
    "MASKED-1",
    premise=(PADDING, HIDDEN, GARBAGE),
    case=lambda scope: cases(scope, context=True, min_context=1, poison=(1e30, 1e9)).map(in_one_call),
    needs=("grad", "static"),
    weight=0.5,
)
def test_what_is_hidden_gets_no_gradient(case: Case, judge: Judge) -> None:
    """Padding inputs and masked static slots get exactly 0, and no bit of any gradient depends on what they hold."""
    case = case.hiding()
    problem, cotangent = case.problem(), cotangent_of(case)
    clean = case.replace(poison=1.0)
    wanted = wanted_gradients(problem, cotangent)
    assert problem.static is not None
    hidden = ~problem.static.mask[:, None, :] & np.ones((1, problem.static.k.shape[1], 1), dtype=bool)

    def check(subject: Subject) -> None:
        got = ask(subject, problem, cotangent)
        for name, where in (("x", ~problem.mask), ("static_k", hidden), ("static_v", hidden)):
            subject.expect(
                problem, not got[name][where].any(), f"what is masked has a gradient of {name} that is not 0"
            )
        hold(subject, problem, got, wanted)
        harmless = ask(subject, clean.problem(), cotangent_of(clean))
        for name, gradient in got.items():
            same = np.array_equal(gradient, harmless[name])
            subject.expect(problem, same, f"the gradient of {name} depends on what masked slots hold")

    judge.each(case, check)


@prop(
    "GRAD-1",
    "LIVE-3",
    premise=ONE_SLOT,
    case=lambda scope: cases(scope, context=True, min_context=1, live=("none",)).map(in_one_call),
    needs=("grad", "static"),
    weight=0.3,
)
def test_the_only_visible_key_gets_the_cotangent_of_its_readers(case: Case, judge: Judge) -> None:
    """live="none" and one visible static key: its value gets the sum of the cotangents of the heads that read it."""
    case = case.respec(static=case.spec.static.replace(live="none"))
    problem, cotangent = case.problem(), cotangent_of(case)
    assert problem.static is not None
    slots = problem.static.mask.shape[1]
    only = np.arange(slots)[None] == np.full((len(problem.static.mask), 1), case.seed % slots)
    filled = problem.static._replace(
        k=np.where(problem.static.mask[:, None, :, None], problem.static.k, 1.0),
        v=np.where(problem.static.mask[:, None, :, None], problem.static.v, 1.0),
        mask=only,
    )
    problem = problem.replace(static=filled)
    wanted = wanted_gradients(problem, cotangent)
    value = Uncertain(gathered(problem, cotangent), wanted["static_v"].variance)

    def check(subject: Subject) -> None:
        got = ask(subject, problem, cotangent)
        hold(subject, problem, got, {"static_v": value})
        hold(subject, problem, got, wanted)

    judge.each(case, check)


def gathered(problem: Problem, cotangent: np.ndarray) -> np.ndarray:
    """[Bc,Hs,S,D]: in the one visible slot, the cotangents of heads that read it, summed over heads, tokens, rows."""
    spec, static = problem.spec, problem.static
    assert static is not None
    real = np.where(problem.mask[:, :, None], cotangent, 0.0).astype(np.float64)
    of_heads = (real @ problem.weights["o_proj.weight"].astype(np.float64)).sum(axis=1)
    of_heads = of_heads.reshape(len(real), spec.num_attention_heads, spec.head_dim)
    total = np.zeros((len(real), len(spec.lyra_kv_heads), spec.head_dim))
    for head in spec.lyra_q_heads:
        total[:, spec.lyra_kv_heads.index(head // spec.group_size)] += of_heads[:, head]
    if len(static.k) == 1:
        total = total.sum(axis=0, keepdims=True)
    return np.where(static.mask[:, None, :, None], total[:, :, None], 0.0)
