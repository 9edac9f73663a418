"""How the studies' steps are timed in JAX: compiled, on a cache that is donated to each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lyra.backends.jax_impl.cache import LiveCache, bucket, live_keys
from lyra.backends.jax_impl.layer import Call, attend_to, layer_of, numbers_of, output, project, rope, shape_of
from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .jax_lm import OPERATIONS, arrays
from .training import Arrays

__all__ = ["OPERATIONS", "full_cache", "repeating_attention", "work"]

Step = Callable[[Any, Any, Any], tuple[Array, Any]]
"""weights, x, caches -> output, and the caches with what the step added."""


def work(step: Step, weights: Arrays, x: np.ndarray, caches: Any) -> Work:
    """The step, run again and again; the caches are as long afterwards as before."""
    parameters, given, held = arrays(weights), jnp.asarray(x), [caches]

    def as_long(old: LiveCache, new: LiveCache) -> LiveCache:
        return new._replace(length=old.length)

    def again(parameters: Any, x: Array, caches: Any) -> tuple[Array, Any]:
        output, grown = step(parameters, x, caches)
        if caches is None:
            return output, grown
        return output, jax.tree.map(as_long, caches, grown, is_leaf=lambda cache: isinstance(cache, LiveCache))

    compiled = jax.jit(again, donate_argnums=2)

    def run() -> Array:
        output, grown = compiled(parameters, given, held[0])
        if caches is not None:
            held[0] = grown
        ready: Array = jax.block_until_ready(output)
        return ready

    return Work(run)


def full_cache(spec: AttentionSpec, batch: int, tokens: int) -> LiveCache:
    """A cache of random keys and values that has room for `tokens` and holds one less."""
    slots, heads, draw = bucket(tokens), spec.num_key_value_heads, np.random.default_rng(0).standard_normal
    return LiveCache(
        keys=jnp.asarray(draw((batch, heads, spec.head_dim, slots), np.float32)),
        values=jnp.asarray(draw((batch, heads, slots, spec.head_dim), np.float32)),
        mask=jnp.ones((batch, slots), bool),
        positions=jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots)),
        length=jnp.asarray(tokens - 1, jnp.int32),
    )


def repeating_attention(
    spec: AttentionSpec, weights: Mapping[str, Array], x: Array, cache: LiveCache
) -> tuple[Array, LiveCache]:
    """A step whose keys and values are repeated for every query head before it attends."""
    wide = shape_of(spec.replace(num_key_value_heads=spec.num_attention_heads))
    times = spec.num_attention_heads // spec.num_key_value_heads
    positions, mask = jnp.broadcast_to(cache.length, (len(x), 1)), jnp.ones((len(x), 1), bool)
    narrow, call = layer_of(weights, numbers_of(spec), shape_of(spec)), Call(positions, mask, None, cache)
    q, k, v = project(x, narrow)
    q, k = rope(q, k, narrow, call)
    assert k is not None
    assert v is not None
    live, grown = cache.append(live_keys(k, v, mask, positions))
    keys, values = (jnp.repeat(part, times, axis=1) for part in (live.keys, live.values))
    many = narrow._replace(shape=wide)
    heads = attend_to(q, live._replace(keys=keys, values=values), many, call)
    return output(heads, many), grown
