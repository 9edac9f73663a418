"""Clause MASKED: what is hidden has no influence, whatever it holds."""

from __future__ import annotations

import numpy as np

from lyra.conformance.case import Case
from lyra.conformance.judge import Judge
from lyra.conformance.premises import CAUSAL, EMPTY, GARBAGE, HIDDEN, NONE, NOTHING_SEEN, ONE_SLOT, PADDING, SELF
from lyra.conformance.registry import prop
from lyra.conformance.strategies import LIVE, cases
from lyra.conformance.subject import Subject
from lyra.spec.split import HeadSplit

EVERY_MODE = (CAUSAL, SELF, NONE)


@prop(
    "MASKED-1",
    "MASKED-4",
    "STATIC-3",
    premise=(PADDING, HIDDEN, GARBAGE),
    case=lambda scope: cases(scope, context=True, min_context=1, poison=(3e38, 1e30, 3e4)),
    needs=("static",),
    weight=2,
)
def test_poison_has_no_influence(case: Case, judge: Judge) -> None:
    """Padding tokens and hidden static slots full of garbage: no bit of the output moves with it."""
    case = case.hiding()
    problem, clean = case.problem(), case.replace(poison=1.0).problem()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect_oracle(problem, outcome)
        subject.expect_equal(problem, outcome.output, subject.run(clean).output, "the same case with harmless garbage")

    judge.each(case, check)


@prop(
    "MASKED-2",
    "MASKED-3",
    "LIVE-3",
    premise=NOTHING_SEEN,
    case=lambda scope: cases(scope, context=True, live=("none",)),
    needs=("static", "trace"),
)
def test_a_row_that_sees_nothing_gives_zero(case: Case, judge: Judge) -> None:
    """live="none" and nothing visible in the context: the Lyra heads are exactly 0 at every real token."""
    case = case.respec(static=case.spec.static.replace(live="none"))
    problem = case.problem()
    assert problem.static is not None
    problem = problem.replace(static=problem.static._replace(mask=problem.static.mask & False))
    lyra = list(problem.spec.lyra_q_heads)

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        heads = outcome.trace["heads"][problem.real][:, lyra]
        subject.expect(
            problem, not heads.any(), f"Lyra heads see no key and give {np.abs(heads).max(initial=0):.3g}, not 0"
        )
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop(
    "MASKED-5",
    "LIVE-3",
    premise=ONE_SLOT,
    case=lambda scope: cases(scope, context=True, min_context=1, live=("none",)),
    needs=("static", "trace"),
    weight=0.5,
)
def test_one_visible_key_gives_its_value(case: Case, judge: Judge) -> None:
    """live="none" and one visible static key among poison: every Lyra head gives that key's value, bit for bit."""
    case = case.respec(static=case.spec.static.replace(live="none"))
    problem = case.problem()
    spec, static = problem.spec, problem.static
    assert static is not None
    slot = np.random.default_rng(case.seed).integers(0, static.mask.shape[1], len(static.mask))
    only = np.arange(static.mask.shape[1]) == slot[:, None]
    shown = static.mask[:, None, :, None] | ~only[:, None, :, None]
    layer = static._replace(
        k=np.where(shown, static.k, np.float32(1)), v=np.where(shown, static.v, np.float32(2)), mask=only
    )
    problem = problem.replace(static=layer)
    lyra = list(spec.lyra_q_heads)
    value = layer.v[np.arange(len(slot)), :, slot][:, [spec.lyra_kv_heads.index(h // spec.group_size) for h in lyra]]
    wanted = np.broadcast_to(value[:, None], (*problem.mask.shape, *value.shape[1:]))

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        subject.expect_equal(problem, outcome.trace["heads"][:, :, lyra], wanted, "the one visible value", "heads")
        subject.expect_oracle(problem, outcome)

    judge.each(case, check)


@prop("MASKED-3", premise=EMPTY, case=lambda scope: cases(scope, context=True), needs=("static",))
def test_an_empty_context(case: Case, judge: Judge) -> None:
    """A context of no tokens at all, in every mode."""
    assert case.context is not None
    judge.oracle(case.replace(context=case.context.replace(tokens=0, start=0, hidden=(0,))))


@prop("MASKED-2", "MASKED-3", premise=EVERY_MODE, case=lambda scope: cases(scope, context=False), needs=("static",))
def test_no_context_in_every_mode(case: Case, judge: Judge) -> None:
    """All heads to Lyra and no context: causal is the plain layer, self the token's own value, none exactly 0."""
    mode = case.seed // 5 % len(LIVE)  # with the data: each example has several, though their seeds are 3·n apart
    static = case.spec.static.replace(live=LIVE[mode])
    judge.oracle(case.respec(split=HeadSplit.all(case.spec), static=static))


@prop(
    "MASKED-4",
    "MASKED-1",
    premise=(PADDING, GARBAGE),
    case=lambda scope: cases(scope, poison=(3e38,)),
    needs=("static",),
)
def test_padding_positions_stay_finite(case: Case, judge: Judge) -> None:
    """The output at padding positions is finite, with a whole row of padding but one token too."""
    case = case.replace(padding=(case.tokens - 1,) * case.batch)
    judge.oracle(case)
