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

from lyra.backends.jax_impl.cache import LiveCache, bucket, live_keys
from lyra.backends.jax_impl.grouped import GroupedQueryAttention
from lyra.backends.jax_impl.layer import (
    Call,
    Flow,
    Layer,
    attend_to,
    constants_of,
    output,
    project,
    rope,
    shape_of,
)
from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .jax_lm import LanguageModel
from .language_model import LMSpec

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


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


def repeated_decode(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """The step of `decode` with the keys and values of the cache repeated for every query head, as repeat_kv does."""
    layer = GroupedQueryAttention.from_spec(AttentionSpec.from_dict(spec), rngs=nnx.Rngs(0))
    own = layer.spec
    wide = shape_of(own.replace(num_key_value_heads=own.num_attention_heads))
    times = own.num_attention_heads // own.num_key_value_heads
    positions, mask = jnp.full((batch, 1), tokens - 1, jnp.int32), jnp.ones((batch, 1), bool)

    def step(module: GroupedQueryAttention, x: jax.Array, cache: LiveCache) -> tuple[jax.Array, LiveCache]:
        weights = {f"{name}.weight": getattr(module, name).weight[...] for name in PROJECTIONS}
        narrow, call = Layer(weights, constants_of(own), shape_of(own)), Call(positions, mask, None, cache)
        flow = rope(project(Flow(cache, {"x": x}), narrow, call), narrow, call)
        live, grown = cache.append(live_keys(flow.values["k"], flow.values["v"], mask, positions))
        keys, values = (jnp.repeat(part, times, axis=1) for part in (live.keys, live.values))
        many = narrow._replace(shape=wide)
        flow = attend_to(live._replace(keys=keys, values=values), flow, many, call)
        return output(flow, many, call).values["output"], grown

    x = _random(batch, 1, own.hidden_size)
    return Work(_steps(layer, x, full_cache(own, batch, tokens), step, tokens))


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


def _steps(module: Any, x: Any, caches: Any, call: Callable[..., Any], tokens: int) -> Callable[[], jax.Array]:
    """A function that runs one compiled step on the caches, which are then as long as before."""
    graph, weights = nnx.split(module)
    held = [caches]

    def shorter(cache: LiveCache) -> LiveCache:
        return cache._replace(length=jnp.asarray(tokens - 1, jnp.int32))

    def step(weights: Any, x: Any, caches: Any) -> Any:
        output, grown = call(nnx.merge(graph, weights), x, caches)
        return output, jax.tree.map(shorter, grown, is_leaf=lambda one: isinstance(one, LiveCache))

    compiled = jax.jit(step, donate_argnums=2)

    def run() -> jax.Array:
        output, held[0] = compiled(weights, x, held[0])
        ready: jax.Array = jax.block_until_ready(output)
        return ready

    return run


def _random(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
