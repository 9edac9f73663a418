"""One attention layer: its stages, each a function over tensors, and the pipeline that runs them in the spec's order.

Axes: B rows, T tokens of the call, L live keys, S static slots, E hidden_size, Hq query heads, Hkv KV heads,
R = Hq / Hkv, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from lyra.spec.array_types import Float
from lyra.spec.attention import TRACES, AttentionSpec

from .cache import Cache, Keys, live_keys
from .dtype import store
from .heads import LyraHeads, blend, fold, lyra_heads, unfold
from .norm import rms_norm
from .partial import finish, merge, nothing, partial_attention
from .rope import cos_sin, inverse_frequencies, rotate
from .static import StaticKV, static_attention
from .visibility import LiveRule, live_rule

Map = Callable[[Tensor], Tensor]
"""A framework's module, or a closure over weights."""


class Parts(NamedTuple):
    """What a layer computes with: projections [B,T,in] -> [B,T,out], and norms of heads [B,T,H,D], if it has them.

    Without k_proj, v_proj and k_norm it makes no keys of its own: it reads what its cache holds.
    """

    q_proj: Map
    k_proj: Map | None
    v_proj: Map | None
    o_proj: Map
    q_norm: Map | None
    k_norm: Map | None


class Numbers(NamedTuple):
    """The numbers of a spec; None for a part that the layer does not have.

    eps is that of `parts_of`; frequencies float64 [D/2]. Both are None also where modules know better: norms that have
    their own, and calls that bring the `turn` of their positions.
    """

    scale: float
    eps: float | None
    softcap: float | None
    window: int | None
    frequencies: Float[Tensor, " half"] | None
    rule: LiveRule | None
    heads: LyraHeads | None


class Shape(NamedTuple):
    """Sizes of a layer, and the order of its stages."""

    query_heads: int
    kv_heads: int
    head_dim: int
    order: tuple[str, ...]


class Layer(NamedTuple):
    """Parts, numbers and shape of one layer."""

    parts: Parts
    numbers: Numbers
    shape: Shape


class Call(NamedTuple):
    """What one call brings: positions int, mask bool [B,T]; static keys or None; the cache that the call's keys go to.

    Both are None where a model has drawn its own mask (see `hf_cache`); the cache is None where no live key is read.
    `blend` float32 [B,Hq] blends heads with and without static keys. `turn` holds cosine and sine of the positions,
    broadcastable to [B,T,D/2], where a model has computed them for many layers.
    """

    positions: Any
    mask: Any
    static: StaticKV | None
    cache: Cache | None
    blend: Float[Tensor, "B Hq"] | None = None
    turn: tuple[Tensor, Tensor] | None = None


def parts_of(weights: Mapping[str, Tensor], eps: float | None) -> Parts:
    """The parts of a layer with these weights, by Hugging Face's names; eps None without norms. ORDER-1, NORM.

    A product of bfloat16 matrices is summed in float32, its bias added, and rounded once (DTYPE-2).
    """
    q_proj, k_proj, v_proj, o_proj = (
        partial(linear, weight=weights[f"{name}.weight"], bias=weights.get(f"{name}.bias"))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    if eps is None:
        return Parts(q_proj, k_proj, v_proj, o_proj, None, None)
    q_norm, k_norm = (partial(rms_norm, weight=weights[f"{name}.weight"], eps=eps) for name in ("q_norm", "k_norm"))
    return Parts(q_proj, k_proj, v_proj, o_proj, q_norm, k_norm)


def numbers_of(spec: AttentionSpec, *, device: torch.device | None = None) -> Numbers:
    """The numbers of a spec."""
    frequencies = inverse_frequencies(spec)
    return Numbers(
        scale=spec.scale,
        eps=None if spec.qk_norm is None else spec.qk_norm.eps,
        softcap=spec.softcap,
        window=spec.sliding_window,
        frequencies=frequencies if device is None or frequencies is None else frequencies.to(device),
        rule=live_rule(spec, device=device),
        heads=lyra_heads(spec, device=device),
    )


def shape_of(spec: AttentionSpec) -> Shape:
    """Sizes of a spec and the order of its stages."""
    return Shape(spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, spec.order)


def layer_of(weights: Mapping[str, Tensor], numbers: Numbers, shape: Shape) -> Layer:
    """The layer of these weights and numbers."""
    return Layer(parts_of(weights, numbers.eps), numbers, shape)


def project(
    x: Float[Tensor, "B T E"], layer: Layer
) -> tuple[Float[Tensor, "B T Hq D"], Float[Tensor, "B T Hkv D"] | None, Float[Tensor, "B T Hkv D"] | None]:
    """x [B,T,E] -> q [B,T,Hq,D], k and v [B,T,Hkv,D], or None where the layer makes none. Clause ORDER-1."""
    parts, head_dim = layer.parts, layer.shape.head_dim
    q = by_head(parts.q_proj(x), head_dim)
    if parts.k_proj is None or parts.v_proj is None:
        return q, None, None
    return q, by_head(parts.k_proj(x), head_dim), by_head(parts.v_proj(x), head_dim)


def by_head(x: Float[Tensor, "B T width"], head_dim: int) -> Float[Tensor, "B T H {head_dim}"]:
    """[B,T,H·D] -> [B,T,H,D], head h being columns h·D to (h+1)·D."""
    return x.unflatten(-1, (-1, head_dim))


def norm(
    q: Float[Tensor, "B T Hq D"], k: Float[Tensor, "B T Hkv D"] | None, layer: Layer
) -> tuple[Float[Tensor, "B T Hq D"], Float[Tensor, "B T Hkv D"] | None]:
    """RMSNorm of queries and keys per head, if the layer has one. Clause NORM."""
    parts = layer.parts
    q = q if parts.q_norm is None else parts.q_norm(q)
    return q, k if k is None or parts.k_norm is None else parts.k_norm(k)


def rope(
    q: Float[Tensor, "B T Hq D"], k: Float[Tensor, "B T Hkv D"] | None, layer: Layer, call: Call
) -> tuple[Float[Tensor, "B T Hq D"], Float[Tensor, "B T Hkv D"] | None]:
    """Queries and keys [B,T,H,D] turned to the positions of the call, if the layer has RoPE. Clause ROPE."""
    turn = call.turn
    if turn is None:
        if layer.numbers.frequencies is None:
            return q, k
        turn = cos_sin(call.positions, layer.numbers.frequencies)
    cos, sin = turn[0].unsqueeze(2), turn[1].unsqueeze(2)
    return rotate(q, cos, sin), None if k is None else rotate(k, cos, sin)


def attend(
    q: Float[Tensor, "B T Hq D"],
    k: Float[Tensor, "B T Hkv D"] | None,
    v: Float[Tensor, "B T Hkv D"] | None,
    layer: Layer,
    call: Call,
) -> tuple[Float[Tensor, "B T Hq D"], Any]:
    """The heads [B,T,Hq,D], and the cache with the call's keys: see `attend_to`. Clauses STATIC, LIVE."""
    if call.cache is None:
        return attend_to(q, None, layer, call), None
    new = None if k is None or v is None else live_keys(k, v, call.mask, call.positions)
    live, cache = call.cache.append(new)
    return attend_to(q, live, layer, call), cache


def attend_to(q: Float[Tensor, "B T Hq D"], live: Keys | None, layer: Layer, call: Call) -> Float[Tensor, "B T Hq D"]:
    """Every head over the live keys it sees, Lyra heads over the static ones too, with one softmax: [B,T,Hq,D].

    Clauses STATIC, LIVE. Vanilla heads keep what the live keys gave them (SPLIT-4).
    """
    numbers, without = layer.numbers, None
    queries = fold(q, layer.shape.kv_heads)
    if live is None:
        part = nothing(queries)
    else:
        visible = live.visible(call.positions, numbers.window, numbers.rule)
        part = partial_attention(queries, live.keys, live.values, visible, numbers.scale, numbers.softcap)
    if call.static is not None and numbers.heads is not None:
        without = part if call.blend is not None else None
        part = merge(part, static_attention(queries, call.static, numbers.heads, numbers.scale, numbers.softcap))
    heads = finish(part)
    if without is not None and call.blend is not None:
        heads = blend(finish(without), heads, call.blend)
    return unfold(store(heads, q.dtype))


def output(heads: Float[Tensor, "B T Hq D"], layer: Layer) -> Float[Tensor, "B T E"]:
    """Heads [B,T,Hq,D] concatenated in their original order and projected, [B,T,E]. Clause ORDER-1."""
    return layer.parts.o_proj(heads.flatten(2))


def run_layer(
    x: Float[Tensor, "B T E"], layer: Layer, call: Call, trace: dict[str, Tensor] | None = None
) -> tuple[Float[Tensor, "B T E"], Any]:
    """All stages in the spec's order: output [B,T,E] and the cache with the call's tokens. Clause ORDER.

    x [B,T,E], of the type that stages are stored in. Padding enters as zeros: nothing it holds can overflow, and no
    real token sees it (MASKED-4). `trace` is given what every stage makes, by the names of `TRACES`.
    """
    if call.mask is not None:
        x = torch.where(call.mask[:, :, None], x, 0.0)
    q = heads = result = x
    k: Tensor | None = None
    v: Tensor | None = None
    cache: Any = call.cache
    made: tuple[Tensor | None, ...] = ()
    for stage in layer.shape.order:
        if stage == "project":
            made = q, k, v = project(x, layer)
        elif stage == "norm":
            made = q, k = norm(q, k, layer)
        elif stage == "rope":
            made = q, k = rope(q, k, layer, call)
        elif stage == "attend":
            heads, cache = attend(q, k, v, layer, call)
            made = (heads,)
        elif stage == "output":
            result = output(heads, layer)
            made = (result,)
        if trace is not None:
            note(trace, stage, *made)
    return result, cache


def note(trace: dict[str, Tensor], stage: str, *made: Tensor | None) -> None:
    """Write down what a stage has made, but for what it does not make in this layer."""
    trace |= {name: value for name, value in zip(TRACES[stage], made, strict=False) if value is not None}
