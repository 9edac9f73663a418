"""Cases that meet a premise by construction where drawing would leave it to chance: maps of a case, sizes to prefer.

A case that meets the premise already stays as it is, so that nothing is lost of what strategies draw; so does one of a
spec that the run was given, in what that spec says.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lyra.spec.attention import AttentionSpec
from lyra.spec.split import HeadSplit

from .case import Case, Problem
from .case_sizes import CaseSizes
from .scope import Scope


def mostly(change: Callable[[Case], Case]) -> Callable[[Case], Case]:
    """A map that leaves one case in four as it is, by its seed."""
    return lambda case: change(case) if case.seed % 4 else case


def often(change: Callable[[Case], Case]) -> Callable[[Case], Case]:
    """A map that leaves every other case as it is, by its seed."""
    return lambda case: change(case) if case.seed % 2 else case


def chunked(sizes: CaseSizes) -> bool:
    """A call of several tokens behind another."""
    return any(length > 1 for length in sizes.calls[1:])


def several_rows(sizes: CaseSizes) -> bool:
    """A batch of several rows."""
    return sizes.batch > 1


def grouped(sizes: CaseSizes) -> bool:
    """Several query heads that share a KV head."""
    return sizes.heads[0] > sizes.heads[1]


def several_groups(sizes: CaseSizes) -> bool:
    """Several groups of several query heads."""
    return grouped(sizes) and sizes.heads[1] > 1


def several_kv_heads(sizes: CaseSizes) -> bool:
    """Lyra heads that read several KV heads."""
    return sizes.static_kv_heads > 1


def unless_given(given: bool, change: Callable[[Case], Case]) -> Callable[[Case], Case]:
    """The map, unless what it changes is given by the spec that a run is held to."""
    return (lambda case: case) if given else change


def beside_vanilla(scope: Scope) -> Callable[[Case], Case]:
    """A vanilla head beside Lyra heads, where the layer has more than one head: the first one stays vanilla."""
    return unless_given(scope.has_split, _beside_vanilla)


def _beside_vanilla(case: Case) -> Case:
    spec = case.spec
    heads = spec.lyra_q_heads or tuple(range(spec.num_attention_heads))
    if len(heads) < spec.num_attention_heads:
        return case if spec.lyra_q_heads else case.respec(split=HeadSplit.from_q_heads(spec, heads[:1], share_kv=None))
    return case.respec(split=HeadSplit.from_q_heads(spec, heads[1:] or heads, share_kv=None))


def cutting(scope: Scope) -> Callable[[Case], Case]:
    """A split that cuts a group, where the layer has groups: one head of the last Lyra group stays vanilla."""
    return unless_given(scope.has_split, _cutting)


def _cutting(case: Case) -> Case:
    spec = case.spec
    if spec.group_size == 1 or (spec.split is not None and spec.split.cut_kv_heads):
        return case
    heads = spec.lyra_q_heads or tuple(range(spec.num_attention_heads))
    return case.respec(split=HeadSplit.from_q_heads(spec, heads[:-1], share_kv=None))


def hidden_slots(case: Case) -> Case:
    """A hidden slot in every row of the context, beside others where there are any."""
    context = case.context
    if context is None:
        return case
    return case.replace(context=context.replace(hidden=tuple(max(1, count) for count in context.hidden)))


def with_visible(count: int) -> Callable[[Case], Case]:
    """A map that leaves so many slots of every row of the context visible, where it has them."""

    def change(case: Case) -> Case:
        context = case.context
        if context is None:
            return case
        most = max(0, context.tokens - count)
        return case.replace(context=context.replace(hidden=tuple(min(hidden, most) for hidden in context.hidden)))

    return change


def padded(case: Case) -> Case:
    """A padding token in some row, and a real one in each."""
    if case.tokens < 2 or any(case.padding):
        return case
    return case.replace(padding=tuple(1 + (case.seed + row) % (case.tokens - 1) for row in range(case.batch)))


def beyond_window(scope: Scope) -> Callable[[Case], Case]:
    """A window shorter than the longest row, which has two real tokens at least."""
    return unless_given(scope.has_window, _beyond_window)


def _beyond_window(case: Case) -> Case:
    window = case.spec.sliding_window
    if window is None or case.tokens < 2:
        return case
    real = case.tokens - min(case.padding, default=0)
    if real < 2:
        return _beyond_window(case.replace(padding=()))
    return case.respec(sliding_window=1 + (window - 1) % (real - 1))


def scored_by_first_element(case: Case) -> Problem:
    """A problem whose scores are known to the bit: the first element of x for a live key, of a static key for that.

    Queries are 1 there and 0 elsewhere; values do not read it.
    """
    problem = case.respec(softcap=None, rope=None, qk_norm=None, bias=True, scale=1.0).problem()
    weights = dict(problem.weights)
    score = first_element(problem.spec)
    for kind, row in (("q", np.zeros_like(score)), ("k", score)):
        first = np.arange(len(weights[f"{kind}_proj.bias"])) % problem.spec.head_dim == 0
        weights[f"{kind}_proj.weight"] = np.outer(first, row).astype(np.float32)
        weights[f"{kind}_proj.bias"] = (first & (kind == "q")).astype(np.float32)
    weights["v_proj.weight"] = np.where(score, np.float32(0), weights["v_proj.weight"])
    return problem.replace(weights=weights)


def first_element(spec: AttentionSpec) -> np.ndarray:
    """Which element of x [E] the scores of `scored_by_first_element` are, bool."""
    return np.arange(spec.hidden_size) == 0
