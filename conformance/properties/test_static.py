"""Clause STATIC: one softmax over static and live keys; the static part is never causal."""

from __future__ import annotations

import numpy as np

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.properties.test_identity import HUGGING_FACE, gemma
from lyra.conformance.registry import prop
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject, expected
from lyra.conformance.tolerance import K_PAIR
from lyra.spec.inputs import StaticLayer
from lyra.spec.split import HeadSplit


@prop(
    "STATIC-1",
    "STATIC-2",
    "STATIC-3",
    "LIVE-1",
    case=cases(context=True, live=("causal",)),
    needs=("static",),
    weight=3,
)
def test_one_softmax_over_static_and_live(case: Case, judge: Judge) -> None:
    """Lyra heads attend to static and live keys together, as the oracle does."""
    judge.oracle(case)


@prop(
    "STATIC-1",
    "SPLIT-2",
    "LIVE-2",
    "LIVE-3",
    "POSITION-1",
    "POSITION-2",
    case=cases(context=True, poison=(1e2,)).map(gemma),
    needs=("static",),
    weight=2,
)
def test_equals_hugging_face_per_head(case: Case, judge: Judge) -> None:
    """Splits with contexts, in every mode, equal Hugging Face's own attention run with a mask per head."""
    problem = case.problem()
    theirs = HUGGING_FACE.attention(problem.spec, problem.weights)(
        problem.x, positions=problem.positions, mask=problem.mask, static=problem.static
    ).output

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect_close(problem, outcome.output, theirs, "Hugging Face's attention, masked per head")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "STATIC-2",
    case=cases(
        context=True,
        min_context=1,
        min_tokens=2,
        padding=False,
        hidden=False,
        flavours=("normal",),
        live=("none",),
        positions=("overlay",),
    ),
    needs=("static", "trace"),
)
def test_the_static_part_is_never_causal(case: Case, judge: Judge) -> None:
    """Every live token sees every static token: equal queries give equal rows, the first token's like the last's."""
    case = case.respec(rope=None, static=case.spec.static.replace(live="none"))
    problem = case.problem()
    problem = problem.replace(x=np.repeat(problem.x[:, :1], problem.x.shape[1], axis=1))
    lyra = list(problem.spec.lyra_q_heads)

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        heads = outcome.trace["heads"][:, :, lyra].astype(np.float64)
        sigma = expected(problem)["heads"].sigma[:, :, lyra]
        off = np.abs(heads - heads[:, :1]) > K_PAIR * sigma
        subject.expect(problem, not off.any(), "equal live tokens saw different parts of the context")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "STATIC-2",
    "STATIC-3",
    case=cases(context=True, min_context=1, hidden=False, flavours=("normal",), live=("none",), positions=("overlay",)),
    needs=("static",),
)
def test_every_static_token_counts(case: Case, judge: Judge) -> None:
    """Changing the value of any one visible static token changes every row."""
    case = case.respec(softcap=None, static=case.spec.static.replace(live="none"))
    problem = case.problem()
    assert problem.static is not None
    slot = case.seed % problem.static.mask.shape[1]
    v = problem.static.v.copy()
    v[:, :, slot] += 100.0 * problem.static.mask.shape[1]
    changed = problem.replace(static=problem.static._replace(v=v, k=np.zeros_like(problem.static.k)))
    problem = problem.replace(static=problem.static._replace(k=np.zeros_like(problem.static.k)))

    def check(subject: Subject) -> None:
        one, two = subject.run(problem), subject.run(changed).output
        subject.expect_different(problem, two, one.output, f"the value of static token {slot}")
        subject.expect_oracle(problem, one)

    judge.each(case, check)


@prop("STATIC-4", case=cases(context=True, min_context=1), needs=("static",))
def test_a_context_may_be_permuted_and_padded(case: Case, judge: Judge) -> None:
    """The order of static slots is nothing, their positions are everything; masked slots in between change nothing."""
    problem = case.problem()
    static = problem.static
    assert static is not None
    order = np.random.default_rng(case.seed).permutation(static.mask.shape[1])
    shuffled = StaticLayer(
        k=static.k[:, :, order],
        v=static.v[:, :, order],
        mask=static.mask[:, order],
        positions=static.positions[:, order],
    )

    def check(subject: Subject) -> None:
        whole = subject.run(problem).output
        subject.expect_close(
            problem, subject.run(problem.replace(static=shuffled)).output, whole, "the context in its order"
        )

    judge.each(case, check)


@prop(
    "STATIC-4",
    case=cases(context=True, min_context=1, hidden=False, positions=("overlay",), live=("causal", "none")),
    needs=("static",),
)
def test_a_doubled_context_weighs_twice(case: Case, judge: Judge) -> None:
    """A context given twice equals the oracle's, and without live keys it equals the context given once."""
    problem = case.problem()
    static = problem.static
    assert static is not None
    double = StaticLayer(
        *(np.concatenate([part, part], axis=axis) for part, axis in zip(static, (2, 2, 1, 1), strict=True))
    )
    doubled = problem.replace(static=double)

    def check(subject: Subject) -> None:
        twice = subject.run(doubled)
        subject.expect_oracle(doubled, twice)
        if problem.spec.static.live == "none":
            subject.expect_close(problem, twice.output, subject.run(problem).output, "the context given once")

    judge.each(case, check)


@prop(
    "STATIC-1",
    "POSITION-1",
    "COMPOSE-1",
    case=cases(context=False, min_tokens=2, padding=False, live=("causal",)),
    needs=("static", "trace"),
)
def test_a_context_equals_the_same_tokens_as_prefix(case: Case, judge: Judge) -> None:
    """All heads to Lyra, the context being a layer's own keys and values: the layer over prefix and rest together."""
    case = case.respec(
        split=HeadSplit.all(case.spec), static=case.spec.static.replace(live="causal", positions="continue")
    ).replace(start=0)
    whole = case.replace(calls=(case.tokens,)).problem()
    cut = case.tokens // 2
    name = "k_norm" if case.spec.qk_norm is not None else "k_proj"

    def check(subject: Subject) -> None:
        full = subject.run(whole, trace=True)
        prefix = {stage: full.trace[stage][:, :cut].swapaxes(1, 2) for stage in (name, "v_proj")}
        rest = whole.replace(
            x=whole.x[:, cut:],
            positions=whole.positions[:, cut:] - cut,
            mask=whole.mask[:, cut:],
            calls=(case.tokens - cut,),
            static=StaticLayer(prefix[name], prefix["v_proj"], whole.mask[:, :cut], whole.positions[:, :cut]),
        )
        subject.expect_close(rest, subject.run(rest).output, full.output[:, cut:], "the same tokens as ordinary prefix")

    judge.each(case, check)
