"""One attention layer: its stages, each a function, and the pipeline that runs them in the spec's order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from lyra.spec.attention import TRACES, AttentionSpec

from . import visibility
from .cache import LiveCache, live_tokens
from .dtype import store
from .heads import LyraHeads, fold, fold_batch, unfold, unfold_batch
from .norm import rms_norm
from .partial import Partial, finish, keep, merge, partial_attention
from .rope import cos_sin, inverse_frequencies, rotate
from .sharding import merge_over, shared_by
from .static import PreparedStatic

Weights = Mapping[str, torch.Tensor]


class Call(NamedTuple):
    """x [B,T,E], of the type that stages are stored in; positions int [B,T]; mask bool [B,T]; static, cache or None."""

    x: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    static: PreparedStatic | None
    cache: LiveCache | None


def project(spec: AttentionSpec, weights: Weights, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [B,T,E] -> q [B,T,Hq,D], k and v [B,T,Hkv,D]. Clause ORDER-1."""
    q, k, v = (projection(spec, weights, name, x) for name in ("q_proj", "k_proj", "v_proj"))
    return q, k, v


def projection(spec: AttentionSpec, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """x [B,T,E] through one projection, "q_proj", "k_proj" or "v_proj", and into heads [B,T,H,D]. Clause ORDER-1.

    A product of bfloat16 matrices is summed in float32, its bias added, and rounded once (DTYPE-2).
    """
    flat = linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    return flat.unflatten(-1, (-1, spec.head_dim))


def norm(spec: AttentionSpec, weights: Weights, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of queries and keys per head. Clause NORM."""
    assert spec.qk_norm is not None
    eps = spec.qk_norm.eps
    return rms_norm(q, weights["q_norm.weight"], eps), rms_norm(k, weights["k_norm.weight"], eps)


def rope(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [B,T,H,D] turned to their positions [B,T]. Clause ROPE."""
    assert spec.rope is not None
    cos, sin = cos_sin(positions, inverse_frequencies(spec.rope, spec.head_dim))
    cos, sin = cos[:, :, None], sin[:, :, None]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def attend(spec: AttentionSpec, lyra: LyraHeads, q: torch.Tensor, live: LiveCache, call: Call) -> torch.Tensor:
    """Every head over the live keys it sees, Lyra heads over the static ones too; [B,T,Hq,D]. Clauses STATIC, LIVE."""
    tokens = (call.positions, call.mask, live.positions, live.mask)
    mode = spec.static.live if spec.lyra_q_heads else "causal"
    causal = visibility.causal(*tokens, spec.sliding_window)
    own = visibility.own(*tokens) if mode == "self" else None
    seen = visibility.by_head(causal, own, lyra.queries, mode)
    queries = fold(q, spec.num_key_value_heads)
    total = partial_attention(queries, live.k, live.v, seen, spec.scale, spec.softcap)
    if call.static is not None:
        total = add_static(total, queries, call.static, lyra, spec.scale, spec.softcap)
    return unfold(store(finish(total), q.dtype))


def add_static(
    live: Partial,
    queries: torch.Tensor,
    static: PreparedStatic,
    lyra: LyraHeads,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Merge the static keys into the live Partial of the Lyra heads; all other heads keep theirs, bit for bit.

    live and queries are folded, [B,Hkv,R,T,...]. Clauses STATIC and SPLIT-4.
    """
    picked = queries if lyra.everywhere else queries.index_select(1, lyra.groups)
    part = static_partial(picked, static, scale, softcap)
    if lyra.chosen is not None:
        part = keep(part, lyra.chosen)
    if lyra.everywhere:
        return merge(live, part)
    merged = merge(Partial(*(field.index_select(1, lyra.groups) for field in live)), part)
    return Partial(*(old.index_copy(1, lyra.groups, new) for old, new in zip(live, merged, strict=True)))


def static_partial(queries: torch.Tensor, static: PreparedStatic, scale: float, softcap: float | None) -> Partial:
    """Queries [B,G,R,T,D] over the static keys; each context is read once for all rows that share it. Clause BATCH.

    Where other processes hold other slots, the result is over the slots of all.
    """
    if static.group is not None:
        own = static._replace(group=None)
        return merge_over(static_partial(shared_by(queries, static.group), own, scale, softcap), static.group)
    visible = None if static.visible is None else static.visible[:, None, None, None, :]
    folded = fold_batch(queries, len(static.k))
    part = partial_attention(folded, static.k, static.v, visible, scale, softcap)
    return Partial(*(unfold_batch(field, queries.shape[2]) for field in part))


def output(weights: Weights, heads: torch.Tensor) -> torch.Tensor:
    """Heads [B,T,Hq,D] concatenated in order and projected, [B,T,E]. Clause ORDER-1."""
    return linear(heads.flatten(2), weights["o_proj.weight"], weights.get("o_proj.bias"))


def run(
    spec: AttentionSpec, weights: Weights, lyra: LyraHeads, call: Call
) -> tuple[torch.Tensor, LiveCache, dict[str, torch.Tensor]]:
    """All stages in the spec's order: output [B,T,E], cache with the new tokens, trace. Clause ORDER."""
    trace: dict[str, torch.Tensor] = {}
    q = k = v = heads = result = call.x
    live = call.cache
    for stage in spec.order:
        made: tuple[torch.Tensor, ...] = ()
        if stage == "project":
            made = q, k, v = project(spec, weights, call.x)
        elif stage == "norm" and spec.qk_norm is not None:
            made = q, k = norm(spec, weights, q, k)
        elif stage == "rope" and spec.rope is not None:
            made = q, k = rope(spec, q, k, call.positions)
        elif stage == "attend":
            new = live_tokens(k, v, call.mask, call.positions)
            live = new if call.cache is None else call.cache.append(new)
            made = (heads := attend(spec, lyra, q, live, call),)
        elif stage == "output":
            made = (result := output(weights, heads),)
        trace |= zip(TRACES[stage], made, strict=False)
    assert live is not None
    return result, live, trace
