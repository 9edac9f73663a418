"""What `lyra gqa speed` and `perplexity` time in JAX: a layer's prefill and decode step, a model's decode step.

Every step is compiled, and the cache is donated to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lyra.backends.jax_impl.cache import LiveCache, bucket
from lyra.backends.jax_impl.grouped import GroupedQueryAttention
from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .jax_lm import LanguageModel
from .language_model import LMSpec


def prefill(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """A layer over so many tokens and an empty cache."""
    layer = GroupedQueryAttention.from_spec(AttentionSpec.from_dict(spec), rngs=nnx.Rngs(0))
    graph, weights = nnx.split(layer)
    x = _random(batch, tokens, layer.spec.hidden_size)
    step = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x))
    return Work(lambda: jax.block_until_ready(step(weights, x)))


def decode(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """A layer over one token more, which with those in the cache makes `tokens`."""
    layer = GroupedQueryAttention.from_spec(AttentionSpec.from_dict(spec), rngs=nnx.Rngs(0))
    x = _random(batch, 1, layer.spec.hidden_size)
    cache = full_cache(layer.spec, batch, tokens)
    return Work(_steps(layer, x, cache, lambda layer, x, cache: layer(x, cache=cache), tokens))


def model_decode(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """The same step of a whole language model, with random weights."""
    sizes = LMSpec.from_dict(spec)
    model = LanguageModel(sizes, rngs=nnx.Rngs(0))
    caches = [full_cache(sizes.attention, batch, tokens) for _ in range(sizes.num_layers)]
    return Work(_steps(model, jnp.zeros((batch, 1), jnp.int32), caches, lambda model, x, held: model(x, held), tokens))


def full_cache(spec: AttentionSpec, batch: int, tokens: int) -> LiveCache:
    """A cache of random keys and values that has room for `tokens` and holds one less."""
    slots = bucket(tokens)
    return LiveCache(
        keys=_random(batch, spec.num_key_value_heads, spec.head_dim, slots),
        values=_random(batch, spec.num_key_value_heads, slots, spec.head_dim),
        mask=jnp.ones((batch, slots), bool),
        positions=jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (batch, slots)),
        length=jnp.asarray(tokens - 1, jnp.int32),
    )


def _steps(module: Any, x: Any, caches: Any, call: Callable[..., Any], tokens: int) -> Callable[[], None]:
    """A function that runs one compiled step on the caches, which are then as long as before."""
    graph, weights = nnx.split(module)
    held = [caches]

    def shorter(cache: LiveCache) -> LiveCache:
        return cache._replace(length=jnp.asarray(tokens - 1, jnp.int32))

    def step(weights: Any, x: Any, caches: Any) -> Any:
        output, grown = call(nnx.merge(graph, weights), x, caches)
        return output, jax.tree.map(shorter, grown, is_leaf=lambda one: isinstance(one, LiveCache))

    compiled = jax.jit(step, donate_argnums=2)

    def run() -> None:
        output, held[0] = compiled(weights, x, held[0])
        jax.block_until_ready(output)

    return run


def _random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
