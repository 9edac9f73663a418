"""Clause DTYPE: bfloat16 between stages, float32 within them; each stage rounded once."""

from __future__ import annotations

from typing import cast

import numpy as np
from hypothesis import strategies as st

from lyra.backends.protocol import Bfloat16Backend, DifferentiableAttention
from lyra.conformance.case import Case, Flavour
from lyra.conformance.judge import Judge
from lyra.conformance.premises import (
    BEHIND_WINDOW,
    BFLOAT16,
    BIAS,
    FAR_TOKENS,
    FINE_DATA,
    GARBAGE,
    HIDDEN,
    NORM_EPS,
    ONE_SOFTMAX,
    OVERLAY,
    PADDING,
    SEVERAL_CALLS,
    UNCENTRED,
    Premise,
)
from lyra.conformance.properties.test_norm import normed
from lyra.conformance.properties.test_rope import rotated
from lyra.conformance.registry import prop
from lyra.conformance.scope import Scope
from lyra.conformance.shaped import beyond_window
from lyra.conformance.strategies import FAR, cases
from lyra.conformance.subject import Subject
from lyra.spec.bfloat16 import to_bfloat16
from lyra.spec.errors import InputError

NEEDS = ("static", "bfloat16")
"""What the properties of this clause need; those that look at stages need "trace" too."""


def anything(scope: Scope) -> st.SearchStrategy[Case]:
    """Whatever there is; every other case has a context."""
    seen = cases(scope, dtype="bfloat16", context=True, min_context=1, live=("causal", "self"))
    return st.one_of(cases(scope, dtype="bfloat16"), seen)


"""Whatever there is, and more often than that static and live keys in one softmax."""

UNKNOWN = ("float16", "float64", "")
UNKNOWN_DTYPE = Premise("a dtype that there is not", names={"UNKNOWN": ()})
WIDE_TOO = Premise(
    "a real token, in bfloat16 and in float32",
    lambda problem: problem.dtype == "bfloat16" and bool(problem.mask.any()),
    lambda case: case.replace(padding=(case.tokens,) * case.batch),
)


def hold_stages(case: Case, judge: Judge, names: tuple[str, ...] | None = None) -> None:
    """Every backend's output is the oracle's, and its stages (or those named) are rounded once."""
    problem = case.problem()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        subject.expect_stages(problem, outcome, names)
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "DTYPE-1",
    "TOLERANCE-4",
    "STATIC-1",
    premise=(BFLOAT16, ONE_SOFTMAX),
    case=anything,
    needs=NEEDS,
    weight=2,
)
def test_every_backend_equals_oracle_and_each_other(case: Case, judge: Judge) -> None:
    """Anything the spec allows: every backend within K·σ of the oracle, any two within K·√2·σ of each other."""
    judge.oracle(case)


@prop(
    "DTYPE-1",
    "DTYPE-2",
    "TOLERANCE-4",
    premise=(BFLOAT16, ONE_SOFTMAX),
    case=anything,
    needs=(*NEEDS, "trace"),
    weight=3,
)
def test_every_stage_is_rounded_once(case: Case, judge: Judge) -> None:
    """Every traced stage is the bfloat16 of what float32 arithmetic makes of the stage before, in every mode."""
    hold_stages(case, judge)


@prop(
    "DTYPE-1",
    "DTYPE-2",
    premise=(BFLOAT16, BIAS),
    case=lambda scope: cases(scope, dtype="bfloat16", context=False),
    needs=(*NEEDS, "trace"),
)
def test_every_projection_adds_its_bias_before_it_is_rounded(case: Case, judge: Judge) -> None:
    """With biases: the sum of products and bias is rounded, not the sum and then the rest."""
    hold_stages(case.respec(bias=True), judge, ("q_proj", "k_proj", "v_proj", "output"))


@prop(
    "DTYPE-2",
    "NORM-1",
    premise=(BFLOAT16, NORM_EPS, UNCENTRED),
    case=lambda scope: cases(scope, dtype="bfloat16", context=False).map(normed),
    needs=(*NEEDS, "trace"),
)
def test_norm_is_computed_in_float32(case: Case, judge: Judge) -> None:
    """Small inputs, where eps decides, large ones, and such with a mean far from zero."""
    flavours: tuple[Flavour, ...] = ("small", "large", "offset")  # with the data: each example has several
    hold_stages(case.replace(flavour=flavours[case.seed % 3]), judge, ("q_norm", "k_norm"))


@prop(
    "DTYPE-2",
    "ROPE-2",
    "ROPE-3",
    premise=(BFLOAT16, FAR_TOKENS),
    case=lambda scope: st.builds(
        lambda case, back: case.replace(start=FAR - back - case.tokens),
        cases(scope, dtype="bfloat16").map(rotated),
        st.integers(0, 99),
    ),
    needs=(*NEEDS, "trace"),
)
def test_far_positions(case: Case, judge: Judge) -> None:
    """Live tokens near position 131,072, which bfloat16 counts in steps of 512 or 1,024."""
    hold_stages(case, judge)


@prop(
    "DTYPE-1",
    "STORED-2",
    premise=(BFLOAT16, OVERLAY),
    case=lambda scope: cases(
        scope, dtype="bfloat16", context=True, min_context=1, positions=("overlay",), flavours=("normal",)
    ).map(rotated),
    needs=(*NEEDS, "trace"),
)
def test_static_keys_are_rounded_after_their_rotation(case: Case, judge: Judge) -> None:
    """live="none", so that heads are made of static keys and values alone: these are stored in bfloat16, once."""
    hold_stages(case.respec(static=case.spec.static.replace(live="none")), judge, ("heads",))


@prop(
    "DTYPE-1",
    "SLIDING-1",
    premise=(BFLOAT16, BEHIND_WINDOW),
    case=lambda scope: cases(scope, dtype="bfloat16", window=True, min_tokens=4).map(beyond_window(scope)),
    needs=(*NEEDS, "trace"),
)
def test_window_in_bfloat16(case: Case, judge: Judge) -> None:
    """Sliding-window layers: the window reaches over the cache, each stage rounded once."""
    hold_stages(case, judge)


@prop(
    "LIVE-4",
    "DTYPE-1",
    premise=(BFLOAT16, SEVERAL_CALLS),
    case=lambda scope: cases(scope, dtype="bfloat16", min_calls=2),
    needs=(*NEEDS, "cache", "trace"),
)
def test_how_calls_are_cut_has_no_effect(case: Case, judge: Judge) -> None:
    """Chunks and one call give the same stages up to one rounding: nothing is rounded again on its way to the cache."""
    problem = case.problem()

    def check(subject: Subject) -> None:
        whole, cut = subject.run(problem, (case.tokens,), trace=True), subject.run(problem, trace=True)
        subject.expect_stages(problem, cut)
        subject.expect_close(problem, cut.output, whole.output, "one-shot prefill")

    judge.each(case, check)


@prop(
    "MASKED-1",
    "MASKED-4",
    "TOLERANCE-3",
    premise=(BFLOAT16, PADDING, HIDDEN, GARBAGE),
    case=lambda scope: cases(scope, dtype="bfloat16", context=True, min_context=1, poison=(3e38, 1e30)),
    needs=NEEDS,
)
def test_poison_has_no_influence(case: Case, judge: Judge) -> None:
    """Padding and hidden static slots full of garbage move no bit; and the same call gives the same bits."""
    case = case.hiding()
    problem, clean = case.problem(), case.replace(poison=1.0).problem()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect_oracle(problem, outcome)
        subject.expect_equal(problem, outcome.output, subject.run(clean).output, "the same case with harmless garbage")
        subject.expect_equal(problem, subject.run(problem).output, outcome.output, "its own first answer")

    judge.each(case, check)


@prop(
    "DTYPE-1",
    premise=FINE_DATA,
    case=lambda scope: cases(scope, dtype="bfloat16", context=True, min_context=1),
    needs=NEEDS,
)
def test_what_comes_in_is_rounded(case: Case, judge: Judge) -> None:
    """Data that are no bfloat16 values give the bits that the nearest bfloat16 values give."""
    fine = case.replace(dtype="float32").problem().replace(dtype="bfloat16")
    problem = case.problem()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect_equal(problem, subject.run(fine).output, outcome.output, "the same data, rounded before")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "DTYPE-1",
    premise=WIDE_TOO,
    case=lambda scope: cases(scope, dtype="bfloat16", context=False, split=False, padding=False, flavours=("normal",)),
    needs=NEEDS,
)
def test_bfloat16_is_not_float32(case: Case, judge: Judge) -> None:
    """The output holds bfloat16 values, and is not what the same layer computes in float32, rounded at the end."""
    problem = case.problem()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        narrow = outcome.output[problem.real]
        subject.expect(problem, bool((narrow == to_bfloat16(narrow)).all()), "the output holds values of float32")
        wide = subject.run(problem.replace(dtype="float32")).output[problem.real]
        subject.expect(
            problem,
            not narrow.size or bool((narrow != to_bfloat16(wide)).any()),
            "the stages before the output are float32",
        )
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "DTYPE-3",
    premise=UNKNOWN_DTYPE,
    case=lambda scope: cases(scope, context=False, split=False, flavours=("normal",)),
    needs=NEEDS,
    weight=0.5,
)
def test_what_there_is_not_is_refused(case: Case, judge: Judge) -> None:
    """Another dtype is refused, naming those there are, gradients in bfloat16 too; float32 by name is the default."""
    problem = case.problem()
    narrow = case.replace(dtype="bfloat16").problem()
    judge.meet(UNKNOWN_DTYPE, bool(UNKNOWN))

    def refusal(subject: Subject, dtype: str) -> str:
        try:
            cast(Bfloat16Backend, subject.backend).attention(problem.spec, problem.weights, dtype=dtype)
        except InputError as error:
            return str(error)
        return "nothing was refused"

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        for dtype in UNKNOWN:
            said = refusal(subject, dtype)
            named = all(name in said for name in (repr(dtype), "float32", "bfloat16"))
            subject.expect(problem, named, f"dtype {dtype!r}: {said}")
        named_layer = subject.attempt(
            lambda: cast(Bfloat16Backend, subject.backend).attention(problem.spec, problem.weights, dtype="float32")
        )
        by_name = subject.attempt(lambda: named_layer(problem.x, positions=problem.positions, mask=problem.mask))
        subject.expect_oracle(problem, outcome)
        subject.expect_close(problem, by_name.output, outcome.output, "the layer of no dtype, in its calls")
        if subject.can("grad"):
            subject.expect(narrow, not has_gradients(subject.layer(narrow), narrow.x, narrow.positions), "it has a vjp")

    judge.each(case, check)


def has_gradients(layer: object, x: np.ndarray, positions: np.ndarray) -> bool:
    """Whether a layer gives gradients rather than refuse them."""
    assert isinstance(layer, DifferentiableAttention)
    try:
        layer.vjp(np.ones_like(x), x, positions=positions)
    except InputError:
        return False
    return True
