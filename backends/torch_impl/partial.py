"""The one attention core: softmax attention over some of the keys, in a form that merges with the rest of them.

A Partial holds the unnormalised output, the largest score and the sum of the exponentials relative to it; two
Partials over disjoint keys merge into the Partial over their union (clauses STATIC-1, STATIC-4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lyra.spec.array_types import Bool, Float

SCORES_PER_TILE = 1 << 22
"""Queries are taken in tiles of about this many scores, so that long prefills need little memory."""


class Partial(NamedTuple):
    """Attention over some of the keys, before the division by the sum. All float32.

    out      [N,H,R,T,D]  Σ exp(score − max) · v
    maximum  [N,H,R,T,1]  the greatest visible score, −inf where no key is visible
    total    [N,H,R,T,1]  Σ exp(score − max), 0 where no key is visible
    """

    out: Float[torch.Tensor, "N H R T D"]
    maximum: Float[torch.Tensor, "N H R T 1"]
    total: Float[torch.Tensor, "N H R T 1"]


def partial_attention(
    query: Float[torch.Tensor, "N H R T D"],
    keys: Float[torch.Tensor, "N H L D"],
    values: Float[torch.Tensor, "N H L D"],
    visible: Bool[torch.Tensor, "#N #H #R #T #L"] | None,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """Attention of query [N,H,R,T,D] over keys, values [N,H,L,D], L at least 1, in float32; clauses SCALE and MASKED.

    visible is bool, broadcastable to [N,H,R,T,L], or None where every query sees every key. A key that is not
    visible has no influence, whatever finite value it holds: its score is selected away, its weight is exactly 0.
    Autocast is kept out: it would take the products in bfloat16 (clause DTYPE-2).
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return partial_attention(query, keys, values, visible, scale, softcap)
    if _exporting():  # one graph for any number of tokens
        return _tile(query, keys, values, visible, scale, softcap)
    tokens = query.shape[-2]
    tile = max(1, SCORES_PER_TILE // max(1, query[..., 0, 0].numel() * keys.shape[-2]))
    if tokens <= tile:
        return _tile(query, keys, values, visible, scale, softcap)
    # Keys that no query of a tile sees are left out, unless to ask for them is to wait for a device or to end a graph.
    asked = device == "cpu" and not torch.compiler.is_compiling()
    parts = []
    for start in range(0, tokens, tile):
        some, rows, some_keys, some_values = query[..., start : start + tile, :], visible, keys, values
        if rows is not None and rows.shape[-2] > 1:
            rows = rows[..., start : start + tile, :]
            seen = _seen_keys(rows) if asked else slice(None)
            rows, some_keys, some_values = rows[..., seen], keys[..., seen, :], values[..., seen, :]
        parts.append(_tile(some, some_keys, some_values, rows, scale, softcap))
    return Partial(*(torch.cat(field, dim=-2) for field in zip(*parts, strict=True)))


def nothing(query: Float[torch.Tensor, "N H R T D"]) -> Partial:
    """The Partial of queries [...,T,D] over no key at all."""
    column = query.new_zeros((*query.shape[:-1], 1), dtype=torch.float32)
    return Partial(query.new_zeros(query.shape, dtype=torch.float32), column - math.inf, column)


def merge(a: Partial, b: Partial) -> Partial:
    """The Partial over the keys of both, which must be disjoint."""
    top = torch.maximum(a.maximum, b.maximum)
    weight_a, weight_b = _relative(a.maximum, top), _relative(b.maximum, top)
    return Partial(a.out * weight_a + b.out * weight_b, top, a.total * weight_a + b.total * weight_b)


def keep(partial: Partial, rows: Bool[torch.Tensor, "*axes"]) -> Partial:
    """The Partial where `rows` (bool, broadcastable to maximum) is True, and that of no visible key elsewhere."""
    return Partial(
        torch.where(rows, partial.out, 0.0),
        torch.where(rows, partial.maximum, -math.inf),
        torch.where(rows, partial.total, 0.0),
    )


def finish(partial: Partial) -> Float[torch.Tensor, "N H R T D"]:
    """Normalise: [...,T,D] float32, exactly 0 where no key was visible (clause MASKED-2).

    A padding query may overflow; its total is NaN, which is not above 0 either, so its heads are finite (MASKED-4).
    """
    seen = partial.total > 0
    return torch.where(seen, partial.out / torch.where(seen, partial.total, 1.0), 0.0)


def masked_scores(
    query: Float[torch.Tensor, "N H R T D"],
    keys: Float[torch.Tensor, "N H L D"],
    visible: Bool[torch.Tensor, "#N #H #R #T #L"] | None,
    scale: float,
    softcap: float | None = None,
) -> Float[torch.Tensor, "N H R T L"]:
    """The scores [N,H,R,T,L] of query over keys, as `partial_attention` takes them, float32; -inf for hidden keys."""
    group, tokens = query.shape[-3:-1]
    queries = (query.float() * scale).flatten(-3, -2)  # [N,H,R·T,D]: one product per KV head
    scores = torch.matmul(queries, keys.float().transpose(-1, -2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.unflatten(-2, (group, tokens))
    if visible is not None:
        scores = torch.where(visible, scores, -math.inf)
    return scores


def _tile(
    query: Float[torch.Tensor, "N H R T D"],
    keys: Float[torch.Tensor, "N H L D"],
    values: Float[torch.Tensor, "N H L D"],
    visible: Bool[torch.Tensor, "#N #H #R #T #L"] | None,
    scale: float,
    softcap: float | None,
) -> Partial:
    scores = masked_scores(query, keys, visible, scale, softcap)
    # The largest score cancels out of the result, so no gradient has to flow through it.
    top = scores.detach().amax(dim=-1, keepdim=True)
    weights = scores.sub_(top.clamp_min(torch.finfo(torch.float32).min)).exp_()
    group, tokens = query.shape[-3:-1]
    if _exporting() and isinstance(group, int):  # where `flatten`, of two symbolic axes, is a condition on their sizes
        out = torch.stack([torch.matmul(head, values.to(torch.float32)) for head in weights.unbind(-3)], dim=-3)
    else:
        out = torch.matmul(weights.flatten(-3, -2), values.float()).unflatten(-2, (group, tokens))
    return Partial(out, top, weights.sum(dim=-1, keepdim=True))


def _exporting() -> bool:
    """Whether torch.export is tracing, for tensors of many shapes."""
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def _seen_keys(visible: Bool[torch.Tensor, "*axes L"]) -> slice:
    """The keys from the first to the last that any query sees; at least one key."""
    seen = visible.flatten(0, -2).any(dim=0).nonzero()
    return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(1)


def _relative(own: Float[torch.Tensor, "*axes"], top: Float[torch.Tensor, "*axes"]) -> Float[torch.Tensor, "*axes"]:
    return torch.exp(own - top.clamp_min(torch.finfo(torch.float32).min))
