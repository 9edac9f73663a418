"""How the studies' steps are timed in JAX: compiled, on a cache that is donated to each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lyra.backends.jax_impl.cache import LiveCache, bucket
from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .jax_lm import OPERATIONS, arrays
from .training import Arrays

__all__ = ["OPERATIONS", "full_cache", "repeat", "work"]

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


def repeat(part: Array, times: int) -> Array:
    """Keys or values [B,Hkv,...], each head so many times."""
    return jnp.repeat(part, times, axis=1)
