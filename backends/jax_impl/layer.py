"""One attention layer: its stages in order, and the pipeline that runs them.

Compiled code depends on shapes and structure only. Every number of a spec (eps, frequencies, scale, softcap, window)
and every choice of heads travels as an array; what a spec lacks is None, which is structure.

Axes: B batch, T tokens of the call, L live keys, S static keys, E hidden_size, Hq query heads, Hkv KV heads,
R = Hq / Hkv, G KV heads with static keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lyra.spec.attention import TRACES, AttentionSpec

from .cache import LiveCache, LiveKeys, first_slots, live_keys
from .dtype import constant, store
from .heads import SplitArrays, blend, fold, fold_visible, join_tokens, split_arrays, unfold
from .norm import rms_norm
from .partial import HIGHEST, Partial, finish, merge, partial_attention
from .rolling import RollingCache
from .rope import cos_sin, inverse_frequencies, rotate
from .sharding import ShardingConfig
from .static import StaticKV, static_attention
from .visibility import LiveRule, live_rule, visible_keys

Cache = LiveCache | RollingCache
WIDEST = 1 << 30
"""A window as wide as this hides nothing, and a position minus it still fits in an int32."""

PARTS, TOKENS_A_PART = 4, 16
"""A call of many tokens attends to live keys in so many parts, each of at least so many tokens."""


class Shape(NamedTuple):
    """What compiled code is specialised to, besides array shapes."""

    query_heads: int
    kv_heads: int
    head_dim: int
    order: tuple[str, ...]
    sharding: ShardingConfig = ShardingConfig.no_sharding()


class Constants(NamedTuple):
    """The numbers of a spec, as float32 and bool arrays; None for a part that the layer does not have."""

    scale: Array
    eps: Array | None
    frequencies: Array | None
    softcap: Array | None
    window: Array | None
    rule: LiveRule | None
    split: SplitArrays | None


class Call(NamedTuple):
    """What one call brings: positions [B,T] int32, mask [B,T] bool, static keys or None, a cache with room for T.

    A RollingCache serves sliding-window layers only. `first` says that the cache is known to be empty, so that the
    tokens of the call need to look at each other only. `gates` float32 [B,Hq] blend heads with and without static keys.
    `turn` holds cosine and sine of the positions, where a model has computed them for many layers.
    """

    positions: Array
    mask: Array
    static: StaticKV | None
    cache: Cache
    first: bool = False
    gates: Array | None = None
    turn: tuple[Array, Array] | None = None


class Flow(NamedTuple):
    """What passes through the stages: the cache, and by name x and output [B,T,E], q and heads [B,T,Hq,D], k and v
    [B,T,Hkv,D].
    """

    cache: Cache
    values: dict[str, Array]

    def add(self, **values: Array) -> Flow:
        """The same with some values new or replaced."""
        return self._replace(values=self.values | values)


class Layer(NamedTuple):
    """Weights by their Hugging Face names, numbers and shape of one layer."""

    weights: Mapping[str, Array]
    constants: Constants
    shape: Shape


def shape_of(spec: AttentionSpec) -> Shape:
    """The part of a spec that compiled code is specialised to."""
    return Shape(spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, spec.order)


def constants_of(spec: AttentionSpec) -> Constants:
    """The part of a spec that travels as arrays."""
    return Constants(
        scale=constant(spec.scale),
        eps=None if spec.qk_norm is None else constant(spec.qk_norm.eps),
        frequencies=inverse_frequencies(spec),
        softcap=None if spec.softcap is None else constant(spec.softcap),
        window=None if spec.sliding_window is None else constant(min(spec.sliding_window, WIDEST), np.int32),
        rule=live_rule(spec),
        split=split_arrays(spec),
    )


def project(flow: Flow, layer: Layer, call: Call) -> Flow:
    """Queries, keys and values by head. Clause ORDER-1."""
    x, shape = flow.values["x"], layer.shape
    return flow.add(
        q=projection(x, layer, "q_proj", shape.query_heads),
        k=projection(x, layer, "k_proj", shape.kv_heads),
        v=projection(x, layer, "v_proj", shape.kv_heads),
    )


def projection(x: Array, layer: Layer, name: str, heads: int) -> Array:
    """x [B,T,E] through one projection and into heads [B,T,heads,D]. Clause ORDER-1."""
    return _heads(_linear(x, layer.weights, name), heads)


def norm(flow: Flow, layer: Layer, call: Call) -> Flow:
    """RMSNorm of queries and keys per head, if the layer has one. Clause NORM."""
    eps = layer.constants.eps
    if eps is None:
        return flow
    return flow.add(
        q=rms_norm(flow.values["q"], layer.weights["q_norm.weight"], eps),
        k=rms_norm(flow.values["k"], layer.weights["k_norm.weight"], eps),
    )


def rope(flow: Flow, layer: Layer, call: Call) -> Flow:
    """Rotate queries and keys at the positions of the call, if the layer has RoPE. Clauses ROPE and ORDER-3."""
    if layer.constants.frequencies is None:
        return flow
    turn = call.turn or cos_sin(call.positions, layer.constants.frequencies)
    cos, sin = (part[:, :, None] for part in turn)
    return flow.add(q=rotate(flow.values["q"], cos, sin), k=rotate(flow.values["k"], cos, sin))


def attend(flow: Flow, layer: Layer, call: Call) -> Flow:
    """Every head over the live keys, Lyra heads over the static keys too, with one softmax. Clauses LIVE and STATIC."""
    new = live_keys(flow.values["k"], flow.values["v"], call.mask, call.positions)
    live, cache = flow.cache.append(new)
    return attend_to(new if call.first else live, flow, layer, call)._replace(cache=cache)


def attend_to(live: LiveKeys, flow: Flow, layer: Layer, call: Call) -> Flow:
    """The same over given live keys; the cache stays as it is."""
    shape, constants = layer.shape, layer.constants
    q = flow.values["q"]
    partial = without = live_attention(live, q, layer, call)
    if call.static is not None and constants.split is not None:
        query, tokens = fold(q, shape.kv_heads), call.mask.shape[1]
        static = static_attention(
            query, call.static, constants.split, tokens, constants.scale, constants.softcap, shape.sharding
        )
        partial = merge(partial, static)
    heads = finish(partial)
    if call.gates is not None:
        heads = blend(finish(without), heads, call.gates)
    heads = store(heads, q.dtype)
    return flow.add(heads=unfold(heads, shape.query_heads))


def live_attention(live: LiveKeys, q: Array, layer: Layer, call: Call) -> Partial:
    """q [B,T,Hq,D] over the live keys that it sees, folded [B,Hkv,R·T,·]. Clause LIVE.

    Many tokens are taken in parts. The keys of a call stand in order, in the last slots or in front of free ones, and
    none is later than its query, so the last slots are left out for all parts but the last.
    """
    tokens, slots = call.mask.shape[1], live.mask.shape[1]
    parts = max(1, min(PARTS, tokens // TOKENS_A_PART))
    bounds = [tokens * part // parts for part in range(parts + 1)]
    found = []
    for start, stop in pairwise(bounds):
        seen = first_slots(live, slots - tokens + stop)
        found.append(_live_part(seen, q[:, start:stop], call.positions[:, start:stop], layer))
    return join_tokens(found, layer.shape.query_heads // layer.shape.kv_heads)


def _live_part(live: LiveKeys, q: Array, positions: Array, layer: Layer) -> Partial:
    shape, constants = layer.shape, layer.constants
    visible = visible_keys(positions, live.positions, live.mask, constants.window, constants.rule)
    visible = fold_visible(visible, shape.query_heads, shape.kv_heads)
    folded = fold(q, shape.kv_heads)
    return partial_attention(folded, live.keys, live.values, visible, constants.scale, constants.softcap)


def output(flow: Flow, layer: Layer, call: Call) -> Flow:
    """Concatenate the heads in their original order and project. Clause ORDER-1."""
    heads = flow.values["heads"]
    return flow.add(output=_linear(heads.reshape(*heads.shape[:2], -1), layer.weights, "o_proj"))


Stage = Callable[[Flow, Layer, Call], Flow]
STAGES: dict[str, Stage] = {"project": project, "norm": norm, "rope": rope, "attend": attend, "output": output}


def run_layer(x: Array, layer: Layer, call: Call) -> tuple[Array, LiveCache | RollingCache, dict[str, Array]]:
    """Run the stages in the spec's order: output [B,T,E], the cache with the call's tokens, every stage's values.

    x [B,T,E], of the type that stages are stored in. Padding enters as zeros: nothing it holds can overflow, and no
    real token sees it. MASKED-4.
    """
    flow = Flow(call.cache, {"x": jnp.where(call.mask[:, :, None], x, 0.0)})
    trace: dict[str, Array] = {}
    for stage in layer.shape.order:
        flow = STAGES[stage](flow, layer, call)
        trace |= {name: flow.values[name.split("_")[0]] for name in TRACES[stage]}
    return flow.values["output"], flow.cache, trace


def _linear(x: Array, weights: Mapping[str, Array], name: str) -> Array:
    """x · Wᵀ (+ bias): x [B,T,in], W [out,in]; summed in float32, rounded to x's type once (DTYPE-2).

    Every reader gets the same values: without the barrier XLA makes a reduction of a single token's product on a GPU,
    and sums it again, in another order, wherever it is read (TOLERANCE-2).
    """
    y = jnp.einsum("bti,oi->bto", x, weights[f"{name}.weight"], precision=HIGHEST, preferred_element_type=jnp.float32)
    bias = weights.get(f"{name}.bias")
    return lax.optimization_barrier(store(y if bias is None else y + bias, x.dtype))


def _heads(x: Array, heads: int) -> Array:
    batch, tokens, width = x.shape
    return x.reshape(batch, tokens, heads, width // heads)
