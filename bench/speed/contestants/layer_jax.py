"""One global layer of Gemma-3 12B in JAX: from rotated queries and live keys to heads, as `layer_torch` has it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import Array

from lyra.backends.jax_impl.cache import LiveKeys
from lyra.backends.jax_impl.layer import Call, attend_to, attention_only, numbers_of, shape_of
from lyra.backends.jax_impl.rope import inverse_frequencies
from lyra.backends.jax_impl.shapes import pad_context
from lyra.backends.jax_impl.static import StaticKV, place_static, prepare_static
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from ..row import Work

LAYER = 5
"""The first global layer."""


def lyra(static: int, live: int, batch: int = 1, tokens: int = 1, layers: int = 1, contexts: int = 1) -> Work:
    """`attend_to`, compiled: half of the heads read a context of `static` tokens, all of them the live keys.

    The context is prepared as for a whole model. `contexts` is 1 for one that all rows share, or the batch for one of
    their own in each.
    """
    spec = half_to_lyra()
    attend = compiled(spec)
    query = jax.device_put(_random(batch, tokens, spec.num_attention_heads, spec.head_dim))
    own = np.arange(live - tokens, live, dtype=np.int32)[None].repeat(batch, axis=0)
    positions, mask = jax.device_put((own, np.ones_like(own, dtype=bool)))
    given = [(live_keys(spec, batch, live), context(spec, contexts, static)) for _ in range(layers)]

    def run() -> None:
        made = [attend(query, keys, static, positions, mask) for keys, static in given]
        jax.block_until_ready(made)

    return Work(run)


def half_to_lyra() -> AttentionSpec:
    """A global layer of the 12B, half of its KV heads read by Lyra heads."""
    spec = ModelSpec.preset("gemma-3-12b").layer(LAYER)
    return spec.replace(split=HeadSplit.half(spec))


def compiled(spec: AttentionSpec) -> Any:
    """The attention of a layer: query [B,T,Hq,D], live keys, context, positions and mask [B,T] to heads [B,T,Hq,D]."""
    layer = attention_only(numbers_of(spec), shape_of(spec))

    @jax.jit
    def attend(query: Array, keys: LiveKeys, static: StaticKV, positions: Array, mask: Array) -> Array:
        return attend_to(query, keys, layer, Call(positions, mask, static, cache=None))

    return attend


def live_keys(spec: AttentionSpec, batch: int, live: int) -> LiveKeys:
    """Random live keys on the device, all visible."""
    heads, width = spec.num_key_value_heads, spec.head_dim
    slots = np.arange(live, dtype=np.int32)[None].repeat(batch, axis=0)
    keys, values = _random(batch, heads, width, live), _random(batch, heads, live, width)
    return LiveKeys(*jax.device_put((keys, values, np.ones_like(slots, dtype=bool), slots)))


def context(spec: AttentionSpec, contexts: int, static: int) -> StaticKV:
    """A random context on the device, as an engine keeps it."""
    shape = (contexts, len(spec.lyra_kv_heads), static, spec.head_dim)
    slots = np.arange(static)[None].repeat(contexts, axis=0)
    layer = StaticLayer(_random(*shape), _random(*shape), np.ones_like(slots, dtype=bool), slots)
    placed = place_static(spec, layer)
    assert placed is not None
    ready: StaticKV = prepare_static(pad_context(placed, 1), inverse_frequencies(spec))
    return ready


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)
