"""Clause SPLIT: any set of query heads goes to Lyra; the others never notice."""

from __future__ import annotations

import numpy as np
import pytest

from lyra.conformance.case import Case, Problem
from lyra.conformance.case_sizes import GROUPS
from lyra.conformance.judge import Judge
from lyra.conformance.premises import (
    BOTH_STREAMS,
    CONTEXT,
    CUT_GROUP,
    LYRA_HEADS,
    SCATTERED,
    SEVERAL_GROUPS,
    SEVERAL_KV_HEADS,
    SEVERAL_TOKENS,
    SHARED_KV_HEAD,
    TILED_GROUPS,
)
from lyra.conformance.registry import prop
from lyra.conformance.scope import Scope
from lyra.conformance.shaped import beside_vanilla, cutting, grouped, often, several_groups, several_kv_heads
from lyra.conformance.strategies import case_of, cases
from lyra.conformance.subject import Subject
from lyra.spec.errors import SpecError
from lyra.spec.split import HeadSplit

DATA = 3
"""How often each size of a group is tried, with other data."""


@prop(
    "SPLIT-2",
    "SPLIT-3",
    "SPLIT-5",
    "STATIC-1",
    premise=(CUT_GROUP, SCATTERED),
    case=lambda scope: cases(scope, context=True, far=False).map(often(cutting(scope))),
    needs=("static",),
    weight=3,
)
def test_any_split_equals_oracle(case: Case, judge: Judge) -> None:
    """Any set of Lyra heads, contiguous or not, whole groups or cut ones, in every mode."""
    judge.oracle(case)


def group_cases(scope: Scope) -> dict[str, Case]:
    """By name, a case for every entry of GROUPS; none where a spec is given, whose heads are its own."""
    rng = np.random.default_rng([scope.seed, 24])
    return {} if scope.spec is not None else {name: case_of(sizes, rng) for name, sizes in GROUPS.items()}


@prop(
    "SPLIT-1",
    "SPLIT-2",
    "ROPE-1",
    "BATCH-1",
    premise=(SEVERAL_GROUPS, CONTEXT),
    named=group_cases,
    needs=("static",),
    weight=0.2,
)
def test_groups_of_every_size(case: Case, judge: Judge) -> None:
    """1 to 8 query heads to a KV head, of which there are 2 to 7, at the sizes that generated cases never have."""
    for index in range(DATA):
        judge.oracle(case.with_other_data(index))


@prop(
    "SPLIT-1",
    "SPLIT-2",
    "MASKED-5",
    premise=TILED_GROUPS,
    case=lambda scope: cases(scope, flavours=("normal",), far=False, prefer=several_groups).map(
        lambda c: c.respec(softcap=None)
    ),
    needs=("static", "trace"),
)
def test_heads_read_their_own_kv_head(case: Case, judge: Judge) -> None:
    """Query head h reads KV head h // R: with one visible key its output is that head's value, bit for bit."""
    case = case.replace(calls=(1,), padding=(), context=None)
    if case.spec.static.live == "none":
        case = case.respec(static=case.spec.static.replace(live="self"))
    problem = case.problem()

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        own = np.repeat(outcome.trace["v_proj"], problem.spec.group_size, axis=2)
        subject.expect(
            problem,
            np.array_equal(outcome.trace["heads"], own),
            "with one visible key a head must give the value of KV head h // R",
        )
        subject.expect_oracle(problem, outcome, "heads")

    judge.each(case, check)


@prop(
    "SPLIT-4",
    premise=(BOTH_STREAMS, CONTEXT),
    case=lambda scope: cases(scope, context=True, min_context=1).map(beside_vanilla(scope)),
    needs=("static", "trace"),
)
def test_vanilla_heads_are_blind_to_the_context(case: Case, judge: Judge) -> None:
    """Vanilla heads give the same bits with one context and with another."""
    problem = case.problem()
    assert problem.static is not None
    other = problem.replace(static=problem.static._replace(k=-problem.static.k, v=problem.static.v + 1))
    heads = sorted(set(range(problem.spec.num_attention_heads)) - set(problem.spec.lyra_q_heads))

    def check(subject: Subject) -> None:
        first, second = subject.run(problem, trace=True), subject.run(other, trace=True)
        same = np.array_equal(
            first.trace["heads"][problem.real][:, heads], second.trace["heads"][problem.real][:, heads]
        )
        subject.expect(problem, same, f"vanilla heads {heads} changed with the context")
        subject.expect_oracle(problem, first, "heads")

    judge.each(case, check)


@prop(
    "SPLIT-5",
    premise=SEVERAL_KV_HEADS,
    case=lambda scope: cases(
        scope, context=True, min_context=1, flavours=("normal",), hidden=False, prefer=several_kv_heads
    ).map(lambda c: c.respec(softcap=None)),
    needs=("static", "trace"),
)
def test_static_heads_come_in_ascending_order(case: Case, judge: Judge) -> None:
    """Axis Hs of the static values belongs to the Lyra KV heads in ascending order: a constant per head comes out."""
    case = case.respec(static=case.spec.static.replace(live="none"))
    problem = case.problem()
    assert problem.static is not None
    constant = np.arange(1.0, 1.0 + len(problem.spec.lyra_kv_heads), dtype=np.float32)
    problem = problem.replace(
        static=problem.static._replace(v=np.broadcast_to(constant[:, None, None], problem.static.v.shape).copy())
    )

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        subject.expect_oracle(problem, outcome, "heads")
        for head in problem.spec.lyra_q_heads:
            wanted = constant[problem.spec.lyra_kv_heads.index(head // problem.spec.group_size)]
            got = outcome.trace["heads"][problem.real][:, head]
            nearest = np.round(got)
            subject.expect(
                problem, bool((nearest == wanted).all()), f"head {head} read {got.flat[0]}, expected {wanted}"
            )

    judge.each(case, check)


@prop(
    "SPLIT-3",
    "SPLIT-1",
    premise=(CUT_GROUP, CONTEXT),
    case=lambda scope: cases(scope, context=True, min_context=1, prefer=grouped).map(cutting(scope)),
    needs=("static",),
)
def test_a_shared_kv_head_is_a_replicated_one(case: Case, judge: Judge) -> None:
    """A layer whose split cuts groups equals the layer with every KV head replicated to its query heads."""
    problem = case.problem()
    assert problem.static is not None
    spec = problem.spec
    weights = dict(problem.weights)
    for name in ["k_proj.weight", "v_proj.weight"] + (["k_proj.bias", "v_proj.bias"] if spec.bias else []):
        by_head = problem.weights[name].reshape(
            spec.num_key_value_heads, spec.head_dim, *problem.weights[name].shape[1:]
        )
        weights[name] = np.repeat(by_head, spec.group_size, axis=0).reshape(-1, *problem.weights[name].shape[1:])
    wide = spec.replace(num_key_value_heads=spec.num_attention_heads, split=HeadSplit(lyra_q_heads=spec.lyra_q_heads))
    group = [spec.lyra_kv_heads.index(head // spec.group_size) for head in spec.lyra_q_heads]
    static = problem.static._replace(k=problem.static.k[:, group], v=problem.static.v[:, group])
    replicated = problem.replace(spec=wide, weights=weights, static=static)

    def check(subject: Subject) -> None:
        subject.expect_close(
            problem, subject.run(replicated).output, subject.run(problem).output, "the layer with shared KV heads"
        )

    judge.each(case, check)


@prop("SPLIT-3", "SPLIT-6", premise=SHARED_KV_HEAD, case=lambda scope: cases(scope, context=False, prefer=grouped))
def test_illegal_splits_are_refused(case: Case, judge: Judge) -> None:
    """A head that is not there, and a cut group without share_kv, are refused when the spec is built."""
    spec = case.spec.replace(split=None)
    with pytest.raises(SpecError, match="no query heads"):
        spec.replace(split=HeadSplit(lyra_q_heads=(spec.num_attention_heads,)))
    if spec.group_size > 1:
        with pytest.raises(SpecError, match="share_kv=True"):
            spec.replace(split=HeadSplit(lyra_q_heads=(spec.num_attention_heads - 1,)))
    with pytest.raises(SpecError, match="not a multiple"):
        spec.replace(num_key_value_heads=spec.num_attention_heads + 1)
    judge.each(case, lambda subject: subject.expect_oracle(problem := case.problem(), subject.run(problem)))


@prop(
    "SPLIT-2",
    "IDENTITY-2",
    premise=(LYRA_HEADS, SEVERAL_TOKENS),
    case=lambda scope: cases(scope, context=False, live=("causal",)),
    needs=("static",),
)
def test_the_split_has_no_effect_without_context(case: Case, judge: Judge) -> None:
    """Without a context and with live="causal", the layer with a split is the layer without one."""
    problem = case.problem()

    def check(subject: Subject) -> None:
        subject.expect_close(
            problem,
            subject.run(problem).output,
            subject.run(problem.with_split(None)).output,
            "the layer without a split",
        )

    judge.each(case, check)


@prop(
    "SPLIT-7",
    "ORDER-1",
    "SPLIT-5",
    premise=(BOTH_STREAMS, CONTEXT),
    case=lambda scope: cases(scope, context=True, flavours=("normal", "offset", "peaked"), prefer=several_kv_heads).map(
        beside_vanilla(scope)
    ),
    needs=("static", "trace"),
)
def test_the_split_of_a_permuted_layer_is_the_permuted_split(case: Case, judge: Judge) -> None:
    """Whole groups permuted, and query heads within them, with weights and static K/V: the same heads elsewhere."""
    problem = case.problem()
    rng = np.random.default_rng(case.seed)
    groups = rng.permutation(problem.spec.num_key_value_heads)
    size = problem.spec.group_size
    order = np.concatenate([group * size + rng.permutation(size) for group in groups])
    moved = permuted(problem, order)

    def check(subject: Subject) -> None:
        here, there = subject.run(problem, trace=True), subject.run(moved, trace=True)
        heads = here.trace["heads"][:, :, order]
        subject.expect_close(moved, there.trace["heads"], heads, "the same heads in their first order", "heads")
        subject.expect_close(moved, there.output, here.output, "the layer with its heads in their first order")

    judge.each(case, check)


def permuted(problem: Problem, order: np.ndarray) -> Problem:
    """The layer whose query head i is head order[i] of this one; `order` keeps groups together."""
    spec = problem.spec
    groups = order[:: spec.group_size] // spec.group_size

    def rows(heads: np.ndarray) -> np.ndarray:
        return (heads[:, None] * spec.head_dim + np.arange(spec.head_dim)).ravel()

    weights = dict(problem.weights)
    for name, heads in (("q_proj", order), ("k_proj", groups), ("v_proj", groups)):
        for part in ("weight", "bias") if spec.bias else ("weight",):
            weights[f"{name}.{part}"] = problem.weights[f"{name}.{part}"][rows(heads)]
    weights["o_proj.weight"] = problem.weights["o_proj.weight"][:, rows(order)]
    lyra = [new for new, old in enumerate(order) if old in spec.lyra_q_heads]
    moved = problem.replace(weights=weights).with_split(HeadSplit.from_q_heads(spec, lyra, share_kv=None))
    static = problem.static
    if static is not None:
        slots = [spec.lyra_kv_heads.index(groups[new]) for new in moved.spec.lyra_kv_heads]
        moved = moved.replace(static=static._replace(k=static.k[:, slots], v=static.v[:, slots]))
    return moved
