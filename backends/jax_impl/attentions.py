"""What heads look at: their softmax weights over static and live keys in one array, formed on request only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lyra.spec.array_types import Float

from .cache import LiveKeys, live_keys
from .decoder import Turned
from .forward import Graph, chunks, open_cache, prefill
from .heads import LyraHeads, fold, select
from .injected import Injected, remembering
from .layer import Call, Layer, Numbers, Shape, attention_only, numbers_of, shape_of
from .modules import Attached
from .partial import finite_maximum, masked_scores
from .static import StaticKV
from .tokens import CHUNK, Packed, Tokens


def look(
    graph: Graph, packed: Packed, attached: Mapping[int, Attached | Injected], layers: Sequence[int]
) -> dict[int, np.ndarray]:
    """By layer what its heads look at when the model runs over packed's tokens [B,N]: float32 [B,Hq,N,S+N].

    S are the slots that the layer's context is padded to. The model runs as it always does, and gives queries and keys.
    """
    batch, width = packed.ids.shape
    cache, wanted = open_cache(graph, batch, width, remembering(attached)), tuple(sorted(set(layers)))
    found: dict[int, tuple[list[Array], list[Array]]] = {layer: ([], []) for layer in wanted}
    for start, stop in chunks(width, CHUNK):
        part, alone = (packed.ids[:, start:stop], packed.mask[:, start:stop]), width <= CHUNK
        _, cache, turned, _ = prefill(graph, *part, cache, attached, capture=wanted, turned=True, first=alone)
        for layer, parts in turned.items():
            for kept, made in zip(found[layer], parts, strict=True):
                kept.append(made)
    whole = {layer: Turned(*(jnp.concatenate(part, axis=1) for part in parts)) for layer, parts in found.items()}
    return {layer: _of_layer(graph, layer, turned, packed, attached.get(layer)) for layer, turned in whole.items()}


def unpack(weights: np.ndarray, packed: Packed, tokens: Tokens, slots: int) -> np.ndarray:
    """Weights [B,Hq,N,S+N] as the caller's tokens stand and with the context's own slots: [B,Hq,T,slots+T]."""
    padded = weights.shape[3] - weights.shape[2]
    rows = np.take_along_axis(weights, packed.source[:, None, :, None], axis=2)
    live = np.take_along_axis(rows[..., padded:], packed.source[:, None, None, :], axis=3)
    whole = np.concatenate([rows[..., :slots], live], axis=3)
    return np.where(tokens.mask[:, None, :, None], whole, np.float32(0))


def attentions(q: Float[Array, "B T Hq D"], live: LiveKeys, layer: Layer, call: Call) -> Float[Array, "B Hq T K"]:
    """The softmax weights of every head, float32 [B,Hq,T,S+L], static keys first. Clauses STATIC-1, MASKED.

    The arguments are those of `attend_to`. A head that does not read the context has 0 in its columns; a row that sees
    nothing is 0.
    """
    numbers, queries = layer.numbers, fold(q, layer.shape.kv_heads)
    visible = live.visible(call.positions, numbers.window, numbers.rule)
    scores = masked_scores(queries, live.keys, visible, numbers.scale, numbers.softcap)
    if call.static is not None and numbers.heads is not None:
        before = _static_scores(queries, call.static, numbers.heads, numbers.scale, numbers.softcap)
        scores = jnp.concatenate([before, scores], axis=-1)
    weights = jnp.exp(scores - finite_maximum(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    shares = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)
    return lax.collapse(shares, 1, 3)


@partial(jax.jit, static_argnames="shape")
def _attentions(
    turned: Turned, positions: Array, mask: Array, numbers: Numbers, static: StaticKV | None, *, shape: Shape
) -> Array:
    live = live_keys(turned.k, turned.k, mask, positions)  # weights need no values
    return attentions(turned.q, live, attention_only(numbers, shape), Call(positions, mask, static, None))


def _of_layer(
    graph: Graph, layer: int, turned: Turned, packed: Packed, attached: Attached | Injected | None
) -> np.ndarray:
    spec = graph.spec.layer(layer).replace(split=None)
    numbers, static = numbers_of(spec), None
    if isinstance(attached, Attached):
        numbers, static = numbers._replace(rule=attached.rule, heads=attached.heads), attached.static
    positions = np.maximum(np.cumsum(packed.mask, axis=1, dtype=np.int32) - 1, 0)
    return np.asarray(_attentions(turned, positions, packed.mask, numbers, static, shape=shape_of(spec)))


def _static_scores(queries: Array, static: StaticKV, heads: LyraHeads, scale: Array, softcap: Array | None) -> Array:
    """Scores of folded queries [B,Hkv,R,T,D] over static keys, [B,Hkv,R,T,S]; -inf for vanilla heads."""
    selected = select(queries, heads)
    visible = None if static.visible is None else static.visible[:, None, None, None, :]
    keys = jnp.broadcast_to(static.keys, (len(selected), *static.keys.shape[1:]))
    scores = jnp.take(masked_scores(selected, keys, visible, scale, softcap), heads.places, axis=1, mode="clip")
    return jnp.where(heads.queries[:, :, None, None], scores, -jnp.inf)
