"""The studies' language model in JAX: its operations, around the backend's own attention, training and timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.nn import silu

from lyra.backends.jax_impl.cache import LiveCache, bucket
from lyra.backends.jax_impl.grouped import GroupedQueryAttention
from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .language_model import LMSpec, Operations, logits
from .training import HELD, ROWS, Arrays, Recipe

Weights = dict[str, Array]
"""Parameters by name."""

Step = Callable[[Any, Any, Any], tuple[Array, Any]]
"""weights, x, caches -> output, and the caches with what the step added."""


def linear(x: Array, weight: Array) -> Array:
    """x · Wᵀ, at float32's own precision."""
    return jnp.einsum("bti,oi->bto", x, weight, precision=jax.lax.Precision.HIGHEST)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x · rsqrt(mean(x²) + eps) · weight over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def attention(
    spec: AttentionSpec, weights: Mapping[str, Array], x: Array, cache: LiveCache | None
) -> tuple[Array, LiveCache]:
    """The backend's module with these weights."""
    graph, parameters = nnx.split(nnx.eval_shape(lambda: GroupedQueryAttention.from_spec(spec, rngs=nnx.Rngs(0))))
    filled = [(path, leaf.replace(weights[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(parameters)]
    module: GroupedQueryAttention = nnx.merge(graph, nnx.from_flat_state(filled))
    return module(x, cache=cache)


OPERATIONS = Operations(lambda tokens, table: table[tokens], linear, rms_norm, silu, attention)


def arrays(weights: Arrays) -> Weights:
    """The weights as arrays of JAX."""
    return {name: jnp.asarray(value) for name, value in weights.items()}


class TrainedModel:
    """A model and its optax.adamw, which decays matrices only."""

    def __init__(self, spec: LMSpec, recipe: Recipe, state: Arrays, done: int) -> None:
        self._step, self._loss = _compiled(spec, recipe)
        self.parameters, mean, square = (
            arrays({name: state[prefix + name] for name in spec.weight_shapes()}) for prefix in HELD
        )
        adam, *others = _optimizer(recipe, 0.0).init(self.parameters)
        self.optimizer: Any = (adam._replace(count=jnp.asarray(done, jnp.int32), mu=mean, nu=square), *others)

    def step(self, tokens: np.ndarray, learning_rate: float) -> tuple[float, float]:
        """One step on windows [rows, window + 1]: the loss before it, and the gradient's norm before it is clipped."""
        state, rate = (self.parameters, self.optimizer), np.float32(learning_rate)
        (self.parameters, self.optimizer), loss, norm = self._step(state, tokens.astype(np.int32), rate)
        return float(loss), float(norm)

    def loss(self, tokens: np.ndarray) -> float:
        """Mean cross-entropy of windows [N, window + 1]."""
        parts = (tokens[start : start + ROWS].astype(np.int32) for start in range(0, len(tokens), ROWS))
        return sum(float(self._loss(self.parameters, part)) * len(part) for part in parts) / len(tokens)

    def state(self) -> dict[str, np.ndarray]:
        """The weights and both moments, by name behind one of HELD."""
        held = zip(HELD, (self.parameters, self.optimizer[0].mu, self.optimizer[0].nu), strict=True)
        return {prefix + name: np.asarray(value) for prefix, part in held for name, value in part.items()}


@cache
def _compiled(spec: LMSpec, recipe: Recipe) -> tuple[Callable[..., Any], Callable[..., Array]]:
    """One step and the loss, compiled once for models that differ in their weights only."""

    def loss(parameters: Weights, tokens: Array) -> Array:
        scores, _ = logits(OPERATIONS, spec, parameters, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]).mean()

    def step(state: tuple[Weights, Any], tokens: Array, rate: Array) -> tuple[tuple[Weights, Any], Array, Array]:
        parameters, optimizer = state
        value, gradients = jax.value_and_grad(loss)(parameters, tokens)
        norm = optax.tree.norm(gradients)
        clipped, _ = optax.clip_by_global_norm(recipe.clip).update(gradients, optax.EmptyState())
        updates, optimizer = _optimizer(recipe, rate).update(clipped, optimizer, parameters)
        return (optax.apply_updates(parameters, updates), optimizer), value, norm

    return jax.jit(step, donate_argnums=0), jax.jit(loss)


def _optimizer(recipe: Recipe, rate: Array | float) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=recipe.beta1,
        b2=recipe.beta2,
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
        mask=lambda parameters: jax.tree.map(lambda parameter: parameter.ndim > 1, parameters),
    )


def work(step: Step, weights: Arrays, x: np.ndarray, caches: Any) -> Work:
    """The step, run again and again; the caches are as long afterwards as before."""
    parameters, given, held = arrays(weights), jnp.asarray(x), [caches]

    def again(parameters: Any, x: Array, caches: Any) -> tuple[Array, Any]:
        output, grown = step(parameters, x, caches)
        if caches is None:
            return output, grown
        return output, jax.tree.map(
            lambda old, new: new._replace(length=old.length),
            caches,
            grown,
            is_leaf=lambda at: isinstance(at, LiveCache),
        )

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
