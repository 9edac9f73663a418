"""What heads look at: their softmax weights over static and live keys in one array, formed on request only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .forward import Graph, chunks, open_cache, prefill
from .gemma3 import Attached, Turned
from .heads import SplitArrays, fold, fold_visible, select_readers
from .injected import Block, remembering
from .layer import Constants, Shape, constants_of, shape_of
from .partial import finite_maximum, masked_scores
from .static import StaticKV
from .tokens import CHUNK, Packed, Tokens
from .visibility import visible_keys


def look(
    graph: Graph, packed: Packed, attached: Mapping[int, Attached | Block], layers: Sequence[int]
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


def attentions(
    turned: Turned, positions: Array, mask: Array, constants: Constants, static: StaticKV | None, shape: Shape
) -> Array:
    """The softmax weights of every head, float32 [B,Hq,T,S+T], static keys first. Clauses STATIC-1, MASKED.

    positions int [B,T], mask bool [B,T]. A head that does not read the context has 0 in its columns; a row that sees
    nothing is 0.
    """
    batch, tokens = mask.shape
    query, scale, softcap = fold(turned.q, shape.kv_heads), constants.scale, constants.softcap
    visible = visible_keys(positions, positions, mask, constants.window, constants.rule)
    visible = fold_visible(visible, shape.query_heads, shape.kv_heads)
    scores = masked_scores(query, turned.k.transpose(0, 2, 3, 1), visible, scale, softcap)
    if static is not None and constants.split is not None:
        before = _static_scores(query, static, constants.split, tokens, scale, softcap)
        scores = jnp.concatenate([before, scores], axis=-1)
    weights = jnp.exp(scores - finite_maximum(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    shares = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)
    return shares.reshape(batch, shape.query_heads, tokens, -1)


_attentions: Any = jax.jit(attentions, static_argnames="shape")


def _of_layer(
    graph: Graph, layer: int, turned: Turned, packed: Packed, attached: Attached | Block | None
) -> np.ndarray:
    spec = graph.spec.layer(layer).replace(split=None)
    constants, static = constants_of(spec), None
    if isinstance(attached, Attached):
        constants, static = constants._replace(rule=attached.rule, split=attached.split), attached.static
    positions = np.maximum(np.cumsum(packed.mask, axis=1, dtype=np.int32) - 1, 0)
    return np.asarray(_attentions(turned, positions, packed.mask, constants, static, shape=shape_of(spec)))


def _static_scores(
    query: Array, static: StaticKV, split: SplitArrays, tokens: int, scale: Array, softcap: Array | None
) -> Array:
    """Scores of folded queries [B,Hkv,R·T,D] over static keys, [B,Hkv,R·T,S]; -inf for vanilla heads."""
    selected = select_readers(query, split)
    visible = None if static.mask is None else static.mask[:, None, None, :]
    keys = jnp.broadcast_to(static.keys, (len(selected), *static.keys.shape[1:]))
    scores = jnp.take(masked_scores(selected, keys, visible, scale, softcap), split.slots, axis=1, mode="clip")
    lyra = jnp.repeat(split.lyra, tokens).reshape(1, query.shape[1], -1, 1)
    return jnp.where(lyra, scores, -jnp.inf)
