"""The one attention core: softmax attention over some of the keys, in a form that merges with the rest of them.

A Partial holds the unnormalised output, the largest score and the sum of the exponentials relative to it; two
Partials over disjoint keys merge into the Partial over their union (clauses STATIC-1, STATIC-4).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

SCORES_PER_BLOCK = 1 << 22
"""Queries are taken in blocks of about this many scores, so that long prefills need little memory."""


class Partial(NamedTuple):
    """out [...,T,D] = sum of exp(score - max) · v; max, sum [...,T,1]. Without a visible key: 0, -inf and 0."""

    out: torch.Tensor
    max: torch.Tensor
    sum: torch.Tensor


def partial_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Partial:
    """Attention of q [N,H,R,T,D] over k, v [N,H,L,D], L at least 1, in float32; clauses SCALE and MASKED.

    visible is bool, broadcastable to [N,H,R,T,L], or None where every query sees every key. A key that is not
    visible has no influence, whatever finite value it holds: its score is selected away, its weight is exactly 0.
    Autocast is kept out: it would take the products in bfloat16 (clause DTYPE-2).
    """
    device = q.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return partial_attention(q, k, v, visible, scale, softcap)
    if _exporting():  # one graph for any number of tokens
        return _block(q, k, v, visible, scale, softcap)
    tokens, keys = q.shape[-2], k.shape[-2]
    block = max(1, SCORES_PER_BLOCK // max(1, q[..., 0, 0].numel() * keys))
    if tokens <= block:
        return _block(q, k, v, visible, scale, softcap)
    # Keys that no query of a block sees are left out, unless to ask for them is to wait for a device or to end a graph.
    asked = device == "cpu" and not torch.compiler.is_compiling()
    parts = []
    for start in range(0, tokens, block):
        queries, rows, own_k, own_v = q[..., start : start + block, :], visible, k, v
        if rows is not None and rows.shape[-2] > 1:
            rows = rows[..., start : start + block, :]
            seen = _seen_keys(rows) if asked else slice(None)
            rows, own_k, own_v = rows[..., seen], k[..., seen, :], v[..., seen, :]
        parts.append(_block(queries, own_k, own_v, rows, scale, softcap))
    return Partial(*(torch.cat(field, dim=-2) for field in zip(*parts, strict=True)))


def nothing(q: torch.Tensor) -> Partial:
    """The Partial of queries [...,T,D] over no key at all."""
    column = q.new_zeros((*q.shape[:-1], 1), dtype=torch.float32)
    return Partial(q.new_zeros(q.shape, dtype=torch.float32), column - math.inf, column)


def merge(a: Partial, b: Partial) -> Partial:
    """The Partial over the keys of both, which must be disjoint."""
    top = torch.maximum(a.max, b.max)
    weight_a, weight_b = _relative(a.max, top), _relative(b.max, top)
    return Partial(a.out * weight_a + b.out * weight_b, top, a.sum * weight_a + b.sum * weight_b)


def keep(partial: Partial, rows: torch.Tensor) -> Partial:
    """The Partial where `rows` (bool, broadcastable to max) is True, and that of no visible key elsewhere."""
    return Partial(
        torch.where(rows, partial.out, 0.0),
        torch.where(rows, partial.max, -math.inf),
        torch.where(rows, partial.sum, 0.0),
    )


def finish(partial: Partial) -> torch.Tensor:
    """Normalise: [...,T,D] float32, exactly 0 where no key was visible (clause MASKED-2).

    A padding query may overflow; its sum is NaN, which is not above 0 either, so its heads are finite (MASKED-4).
    """
    seen = partial.sum > 0
    return torch.where(seen, partial.out / torch.where(seen, partial.sum, 1.0), 0.0)


def masked_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """The scores [N,H,R,T,L] of q over k, as `partial_attention` takes them, in float32; -inf where a key is hidden."""
    group, tokens = q.shape[-3:-1]
    queries = (q.float() * scale).flatten(-3, -2)  # [N,H,R·T,D]: one product per KV head
    scores = torch.matmul(queries, k.float().transpose(-1, -2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.unflatten(-2, (group, tokens))
    if visible is not None:
        scores = torch.where(visible, scores, -math.inf)
    return scores


def _block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Partial:
    scores = masked_scores(q, k, visible, scale, softcap)
    # The largest score cancels out of the result, so no gradient has to flow through it.
    top = scores.detach().amax(dim=-1, keepdim=True)
    weights = scores.sub_(top.clamp_min(torch.finfo(torch.float32).min)).exp_()
    group, tokens = q.shape[-3:-1]
    if _exporting() and isinstance(group, int):  # where `flatten`, of two symbolic axes, is a condition on their sizes
        out = torch.stack([torch.matmul(head, v.to(torch.float32)) for head in weights.unbind(-3)], dim=-3)
    else:
        out = torch.matmul(weights.flatten(-3, -2), v.float()).unflatten(-2, (group, tokens))
    return Partial(out, top, weights.sum(dim=-1, keepdim=True))


def _exporting() -> bool:
    """Whether torch.export is tracing, for tensors of many shapes."""
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def _seen_keys(visible: torch.Tensor) -> slice:
    """The keys from the first to the last that any query sees; at least one key."""
    seen = visible.flatten(0, -2).any(dim=0).nonzero()
    return slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(1)


def _relative(own: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    return torch.exp(own - top.clamp_min(torch.finfo(torch.float32).min))
