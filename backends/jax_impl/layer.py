"""One attention layer: its stages, each a function over arrays, and the pipeline that runs them in the spec's order.

Compiled code depends on shapes and structure only. Every number of a spec (eps, frequencies, scale, softcap, window)
and every choice of heads travels as an array; what a spec lacks is None, which is structure.

Axes: B rows, T tokens of the call, L live keys, S static slots, E hidden_size, Hq query heads, Hkv KV heads,
R = Hq / Hkv, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lyra.spec.array_types import Bool, Float, Int
from lyra.spec.attention import TRACES, AttentionSpec

from .cache import LiveCache, LiveKeys, first_slots, live_keys
from .dtype import Given, constant, store
from .heads import LyraHeads, blend, fold, lyra_heads, unfold
from .linear import linear
from .norm import rms_norm
from .partial import Partial, finish, merge, nothing, partial_attention
from .rolling import RollingCache
from .rope import cos_sin, inverse_frequencies, rotate
from .sharding import ONE_DEVICE, ShardingConfig
from .static import StaticKV, static_attention
from .visibility import LiveRule, live_rule

Cache = LiveCache | RollingCache
Map = Callable[[Array], Array]
"""A module, or a closure over weights."""

WIDEST = 1 << 30
"""A window as wide as this hides nothing, and a position minus it still fits in an int32."""

PARTS, TOKENS_A_PART = 4, 16
"""A call of many tokens attends to live keys in so many parts, each of at least so many tokens."""


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
    """The numbers of a spec, as float32, int32 and bool arrays; None for a part that the layer does not have.

    eps is that of `parts_of`; a module's norms have their own.
    """

    scale: Float[Given, ""]
    eps: Float[Given, ""] | None
    softcap: Float[Given, ""] | None
    window: Int[Given, ""] | None
    frequencies: Float[Given, " D//2"] | None
    rule: LiveRule | None
    heads: LyraHeads | None


class Shape(NamedTuple):
    """What compiled code is specialised to, besides array shapes: sizes, the order of the stages, where arrays lie."""

    query_heads: int
    kv_heads: int
    head_dim: int
    order: tuple[str, ...]
    sharding: ShardingConfig = ONE_DEVICE


class Layer(NamedTuple):
    """Parts, numbers and shape of one layer."""

    parts: Parts
    numbers: Numbers
    shape: Shape


class Call(NamedTuple):
    """What one call brings: positions int32, mask bool [B,T]; static keys or None; a cache with room for its tokens.

    The cache is None where no live key is read; a RollingCache serves sliding-window layers only. `blend` float32
    [B,Hq] blends heads with and without static keys. `turn` holds cosine and sine of the positions, where a model has
    computed them for many layers. `first` says that the cache is known to be empty, so that the tokens of the call need
    to look at each other only.
    """

    positions: Int[Given, "B T"]
    mask: Bool[Given, "B T"]
    static: StaticKV | None
    cache: Cache | None
    blend: Float[Given, "B Hq"] | None = None
    turn: tuple[Float[Array, "B T D//2"], Float[Array, "B T D//2"]] | None = None
    first: bool = False


def parts_of(weights: Mapping[str, Array], eps: Float[Given, ""] | float | None) -> Parts:
    """The parts of a layer with these weights, by Hugging Face's names; eps None without norms. ORDER-1, NORM."""
    q_proj, k_proj, v_proj, o_proj = (
        partial(linear, weight=weights[f"{name}.weight"], bias=weights.get(f"{name}.bias"))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    )
    if eps is None:
        return Parts(q_proj, k_proj, v_proj, o_proj, None, None)
    q_norm, k_norm = (partial(rms_norm, weight=weights[f"{name}.weight"], eps=eps) for name in ("q_norm", "k_norm"))
    return Parts(q_proj, k_proj, v_proj, o_proj, q_norm, k_norm)


def numbers_of(spec: AttentionSpec) -> Numbers:
    """The numbers of a spec."""
    return Numbers(
        scale=constant(spec.scale),
        eps=None if spec.qk_norm is None else constant(spec.qk_norm.eps),
        softcap=None if spec.softcap is None else constant(spec.softcap),
        window=None if spec.sliding_window is None else constant(min(spec.sliding_window, WIDEST), np.int32),
        frequencies=inverse_frequencies(spec),
        rule=live_rule(spec),
        heads=lyra_heads(spec),
    )


def shape_of(spec: AttentionSpec) -> Shape:
    """Sizes of a spec and the order of its stages."""
    return Shape(spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, spec.order)


def layer_of(weights: Mapping[str, Array], numbers: Numbers, shape: Shape) -> Layer:
    """The layer of these weights and numbers."""
    return Layer(parts_of(weights, numbers.eps), numbers, shape)


def attention_only(numbers: Numbers, shape: Shape) -> Layer:
    """A layer for `attend_to` and `attentions` alone, which compute with none of its parts."""
    absent: Any = None
    return Layer(absent, numbers, shape)


def project(
    x: Float[Array, "B T E"], layer: Layer
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hkv D"] | None, Float[Array, "B T Hkv D"] | None]:
    """x [B,T,E] -> q [B,T,Hq,D], k and v [B,T,Hkv,D], or None where the layer makes none. Clause ORDER-1."""
    parts, head_dim = layer.parts, layer.shape.head_dim
    k, v = (None if part is None else by_head(settled(part, x), head_dim) for part in (parts.k_proj, parts.v_proj))
    return by_head(settled(parts.q_proj, x), head_dim), k, v


def by_head(x: Float[Array, "B T width"], head_dim: int) -> Float[Array, "B T H {head_dim}"]:
    """[B,T,H·D] -> [B,T,H,D], head h being columns h·D to (h+1)·D."""
    return x.reshape(*x.shape[:2], -1, head_dim)


def settled(part: Map, x: Float[Array, "B T inputs"]) -> Float[Array, "B T outputs"]:
    """A projection of x, whose readers all get the same values.

    Without the barrier XLA makes a reduction of a single token's product on a GPU, and sums it again, in another order,
    wherever it is read (TOLERANCE-2).
    """
    return lax.optimization_barrier(part(x))


def norm(
    q: Float[Array, "B T Hq D"], k: Float[Array, "B T Hkv D"] | None, layer: Layer
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hkv D"] | None]:
    """RMSNorm of queries and keys per head, if the layer has one. Clause NORM."""
    parts = layer.parts
    q = q if parts.q_norm is None else parts.q_norm(q)
    return q, k if k is None or parts.k_norm is None else parts.k_norm(k)


def rope(
    q: Float[Array, "B T Hq D"], k: Float[Array, "B T Hkv D"] | None, layer: Layer, call: Call
) -> tuple[Float[Array, "B T Hq D"], Float[Array, "B T Hkv D"] | None]:
    """Queries and keys [B,T,H,D] turned to the positions of the call, if the layer has RoPE. Clauses ROPE, ORDER-3."""
    if layer.numbers.frequencies is None:
        return q, k
    cos, sin = (part[:, :, None] for part in call.turn or cos_sin(call.positions, layer.numbers.frequencies))
    return rotate(q, cos, sin), None if k is None else rotate(k, cos, sin)


def attend(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B T Hkv D"] | None,
    v: Float[Array, "B T Hkv D"] | None,
    layer: Layer,
    call: Call,
) -> tuple[Float[Array, "B T Hq D"], Any]:
    """The heads [B,T,Hq,D], and the cache with the call's keys: see `attend_to`. Clauses STATIC, LIVE."""
    past: Any = call.cache
    if past is None:
        return attend_to(q, None, layer, call), None
    new = None if k is None or v is None else live_keys(k, v, call.mask, call.positions)
    live, cache = past.append(new)
    return attend_to(q, new if call.first and new is not None else live, layer, call), cache


def attend_to(q: Float[Array, "B T Hq D"], live: LiveKeys | None, layer: Layer, call: Call) -> Float[Array, "B T Hq D"]:
    """Every head over the live keys it sees, Lyra heads over the static ones too, with one softmax: [B,T,Hq,D].

    Clauses STATIC, LIVE. Vanilla heads keep what the live keys gave them (SPLIT-4).
    """
    numbers, shape = layer.numbers, layer.shape
    queries = fold(q, shape.kv_heads)
    part = without = nothing(queries) if live is None else live_attention(q, live, layer, call)
    if call.static is not None and numbers.heads is not None:
        scores = numbers.scale, numbers.softcap
        part = merge(part, static_attention(queries, call.static, numbers.heads, *scores, sharding=shape.sharding))
    heads = finish(part)
    if call.blend is not None:
        heads = blend(finish(without), heads, call.blend)
    return unfold(store(heads, q.dtype))


def live_attention(q: Float[Array, "B T Hq D"], live: LiveKeys, layer: Layer, call: Call) -> Partial:
    """q [B,T,Hq,D] over the live keys that it sees, folded [B,Hkv,R,T,·]. Clause LIVE.

    Many tokens are taken in parts. The keys of a call stand in order, in the last slots or in front of free ones, and
    none is later than its query, so the last slots are left out for all parts but the last.
    """
    numbers, tokens, slots = layer.numbers, call.mask.shape[1], live.mask.shape[1]
    parts = max(1, min(PARTS, tokens // TOKENS_A_PART))
    found = []
    for start, stop in pairwise(tokens * part // parts for part in range(parts + 1)):
        seen = first_slots(live, slots - tokens + stop)
        visible = seen.visible(call.positions[:, start:stop], numbers.window, numbers.rule)
        some = fold(q[:, start:stop], layer.shape.kv_heads)
        found.append(partial_attention(some, seen.keys, seen.values, visible, numbers.scale, numbers.softcap))
    return (
        found[0] if parts == 1 else Partial(*(jnp.concatenate(fields, axis=3) for fields in zip(*found, strict=True)))
    )


def output(heads: Float[Array, "B T Hq D"], layer: Layer) -> Float[Array, "B T E"]:
    """Heads [B,T,Hq,D] concatenated in their original order and projected, [B,T,E]. Clause ORDER-1."""
    return settled(layer.parts.o_proj, heads.reshape(*heads.shape[:2], -1))


def run_layer(
    x: Float[Array, "B T E"], layer: Layer, call: Call, trace: dict[str, Array] | None = None
) -> tuple[Float[Array, "B T E"], Any]:
    """All stages in the spec's order: output [B,T,E] and the cache with the call's tokens. Clause ORDER.

    x [B,T,E], of the type that stages are stored in. Padding enters as zeros: nothing it holds can overflow, and no
    real token sees it (MASKED-4). `trace` is given what every stage makes, by the names of `TRACES`.
    """
    x = jnp.where(call.mask[:, :, None], x, 0.0)
    q = heads = result = x
    k: Array | None = None
    v: Array | None = None
    cache = call.cache
    for stage in layer.shape.order:
        made: tuple[Array | None, ...] = ()
        if stage == "project":
            made = q, k, v = project(x, layer)
        elif stage == "norm" and layer.parts.q_norm is not None:
            made = q, k = norm(q, k, layer)
        elif stage == "rope" and layer.numbers.frequencies is not None:
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


def note(trace: dict[str, Array], stage: str, *made: Array | None) -> None:
    """Write down what a stage has made, but for what it does not make in this layer."""
    trace |= {name: value for name, value in zip(TRACES[stage], made, strict=False) if value is not None}
