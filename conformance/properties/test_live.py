"""Clause LIVE: what Lyra heads see of the live tokens, however these are cut into calls."""

from __future__ import annotations

import numpy as np

from lyra.conformance.case import Case, Problem
from lyra.conformance.judge import Judge
from lyra.conformance.premises import (
    BOTH_STREAMS,
    CAUSAL,
    CHUNK_BEHIND,
    CONTEXT,
    MANY_TOKENS,
    NONE,
    SELF,
    SEVERAL_TOKENS,
    Premise,
)
from lyra.conformance.properties.block_relations import hold_cuts
from lyra.conformance.registry import prop
from lyra.conformance.shaped import beside_vanilla, first_element, scored_by_first_element
from lyra.conformance.strategies import cases, in_long_calls
from lyra.conformance.subject import Subject, expected

REAL_CONTINUATION = Premise(
    "a real token in either of two continuations",
    tame=lambda case: case.replace(padding=(case.tokens - 1,) * case.batch, padding_side="right"),
)


@prop(
    "LIVE-1",
    premise=(CAUSAL, CONTEXT),
    case=lambda scope: cases(scope, context=True, live=("causal",), min_tokens=2),
    needs=("static", "cache"),
)
def test_causal(case: Case, judge: Judge) -> None:
    """live="causal": Lyra heads see all live tokens up to their own."""
    judge.oracle(case)


@prop("LIVE-2", premise=SELF, case=lambda scope: cases(scope, live=("self",), min_tokens=2), needs=("static", "cache"))
def test_self(case: Case, judge: Judge) -> None:
    """live="self": Lyra heads see their own live token only, with a context and without."""
    judge.oracle(case)


@prop("LIVE-3", premise=NONE, case=lambda scope: cases(scope, live=("none",), min_tokens=2), needs=("static", "cache"))
def test_none(case: Case, judge: Judge) -> None:
    """live="none": Lyra heads see no live token, with a context and without."""
    judge.oracle(case)


@prop(
    "LIVE-4", premise=CHUNK_BEHIND, case=lambda scope: cases(scope, min_tokens=2), needs=("static", "cache"), weight=2
)
def test_calls_may_be_cut_anywhere(case: Case, judge: Judge) -> None:
    """Chunked prefill, one-shot prefill and token-by-token decode give the same outputs, in every mode."""
    hold_cuts(case, judge)


@prop(
    "LIVE-4",
    premise=MANY_TOKENS,
    case=lambda scope: in_long_calls(cases(scope, context=True, smallest=1)),
    needs=("static", "cache"),
    weight=0.5,
)
def test_a_cache_grows_with_its_tokens(case: Case, judge: Judge) -> None:
    """Dozens of live tokens, in calls of one and of many: the oracle's values however far the cache has grown."""
    judge.oracle(case)


@prop("LIVE-4", premise=REAL_CONTINUATION, case=lambda scope: cases(scope, min_tokens=4), needs=("static", "cache"))
def test_a_call_leaves_its_cache_alone(case: Case, judge: Judge) -> None:
    """Going on twice from a cache that has grown: the first continuation stays as it is, and so does the cache."""
    problem = case.problem()
    start, end = case.tokens - 2, case.tokens - 1
    head, tail = problem.part(slice(0, start), (start - 1, 1)), problem.part(slice(start, end), (1,))
    last = problem.part(slice(end, None), (1,))
    judge.meet(REAL_CONTINUATION, bool((tail.mask & last.mask).any()))

    def check(subject: Subject) -> None:
        cache = subject.run(head).cache
        first = subject.run(tail, cache=cache)
        subject.run(tail.replace(x=-tail.x), cache=cache)
        subject.expect_last(problem, subject.run(last, cache=first.cache).output)
        subject.expect_equal(tail, subject.run(tail, cache=cache).output, first.output, "the first continuation")
        subject.expect_oracle(problem, subject.run(problem))

    judge.each(case, check)


@prop(
    "LIVE-5",
    "SPLIT-4",
    premise=(BOTH_STREAMS, SEVERAL_TOKENS),
    case=lambda scope: cases(scope, min_tokens=2, padding=False, live=("self", "none"), flavours=("normal",)).map(
        beside_vanilla(scope)
    ),
    needs=("static", "trace"),
)
def test_vanilla_heads_see_all_live_tokens(case: Case, judge: Judge) -> None:
    """Vanilla heads give the same values in every live mode."""
    problem = case.problem()
    causal = problem.respec(static=problem.spec.static.replace(live="causal"))
    vanilla = np.isin(np.arange(problem.spec.num_attention_heads), problem.spec.lyra_q_heads, invert=True)
    wanted, other = (expected(either)["heads"].value[:, :, vanilla] for either in (problem, causal))

    def check(subject: Subject) -> None:
        subject.expect(problem, bool((wanted == other).all()), "the oracle's vanilla heads depend on the live mode")
        for either in (problem, causal):
            subject.expect_oracle(either, subject.run(either, trace=True), "heads")

    judge.each(case, check)


@prop(
    "LIVE-1",
    "LIVE-4",
    premise=SEVERAL_TOKENS,
    case=lambda scope: cases(scope, min_tokens=3, live=("causal",), padding=False),
    needs=("static",),
)
def test_later_tokens_have_no_influence(case: Case, judge: Judge) -> None:
    """Causal: replacing the last token by poison changes no bit of the rows before it."""
    problem = case.replace(calls=(case.tokens,)).problem()
    x = problem.x.copy()
    x[:, -1] = 1e6
    poisoned = problem.replace(x=x)

    def check(subject: Subject) -> None:
        clean, other = subject.run(problem), subject.run(poisoned).output
        earlier = problem.replace(mask=problem.mask & (np.arange(case.tokens) < case.tokens - 1))
        subject.expect_equal(earlier, other, clean.output, "the same tokens with another one behind them")
        subject.expect_oracle(problem, clean)

    judge.each(case, check)


@prop(
    "LIVE-1",
    "LIVE-5",
    "STATIC-1",
    premise=SEVERAL_TOKENS,
    case=lambda scope: cases(
        scope,
        min_tokens=3,
        live=("causal",),
        padding=False,
        hidden=False,
        far=False,
        flavours=("normal",),
        poison=(1.0,),
    ),
    needs=("static",),
    weight=0.5,
)
def test_every_live_key_and_value_counts(case: Case, judge: Judge) -> None:
    """Changing the key of any one live token, or its value, changes all rows that see it and no bit of those before.

    All scores are the first element of x, which values do not read: a key changes by itself, and always visibly.
    """
    problem = scored_by_first_element(case.replace(calls=(case.tokens,)))
    score = first_element(problem.spec)
    token = case.seed % (case.tokens - 1)

    def changed(part: np.ndarray) -> Problem:
        x = problem.x.copy()
        x[:, token, part] += 1.0
        return problem.replace(x=x)

    def rows(of: Problem, first: int) -> Problem:
        return of.replace(mask=of.mask & (np.arange(case.tokens) >= first))

    def check(subject: Subject) -> None:
        first = subject.run(problem)
        earlier = problem.replace(mask=problem.mask & (np.arange(case.tokens) < token))
        for what, part in (("key", score), ("value", ~score)):
            other = changed(part)
            second = subject.run(other).output
            subject.expect_different(
                rows(problem, token + 1), second, first.output, f"the {what} of live token {token}"
            )
            subject.expect_equal(earlier, second, first.output, f"the rows before token {token} as they were")
        subject.expect_oracle(problem, first)

    judge.each(case, check)
