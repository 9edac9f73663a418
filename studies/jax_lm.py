"""The studies' language model in JAX: its operations, on the backend's GroupedQueryAttention, and its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.nn import silu

from lyra.backends.jax_impl.cache import LiveCache
from lyra.backends.jax_impl.grouped import GroupedQueryAttention
from lyra.spec.attention import AttentionSpec

from .language_model import LMSpec, Operations, logits
from .training import MOMENTS, ROWS, Arrays, Recipe

Weights = dict[str, Array]
"""Parameters by name."""


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
    """A Learner: optax.adamw, which decays matrices only."""

    def __init__(
        self,
        spec: LMSpec,
        recipe: Recipe,
        weights: Mapping[str, np.ndarray],
        moments: Mapping[str, np.ndarray],
        done: int,
    ) -> None:
        self.compiled, self.parameters = _compiled(spec, recipe), arrays(weights)
        self.optimizer: Any = _optimizer(recipe, 0.0).init(self.parameters)
        if done:
            mean, square = ({name: jnp.asarray(moments[prefix + name]) for name in weights} for prefix in MOMENTS)
            adam = self.optimizer[0]._replace(count=jnp.asarray(done, jnp.int32), mu=mean, nu=square)
            self.optimizer = (adam, *self.optimizer[1:])

    def step(self, tokens: np.ndarray, learning_rate: float) -> tuple[float, float]:
        """One step of AdamW on windows [rows, window + 1]: the loss before it, and the gradient's norm."""
        state, rate = (self.parameters, self.optimizer), np.float32(learning_rate)
        (self.parameters, self.optimizer), loss, norm = self.compiled.step(state, tokens.astype(np.int32), rate)
        return float(loss), float(norm)

    def loss(self, tokens: np.ndarray) -> float:
        """Mean cross-entropy of windows [N, window + 1]."""
        parts = (tokens[start : start + ROWS].astype(np.int32) for start in range(0, len(tokens), ROWS))
        return sum(float(self.compiled.loss(self.parameters, part)) * len(part) for part in parts) / len(tokens)

    def weights(self) -> dict[str, np.ndarray]:
        """The weights, by name."""
        return {name: np.asarray(value) for name, value in self.parameters.items()}

    def moments(self) -> dict[str, np.ndarray]:
        """AdamW's moments, by name behind one of MOMENTS."""
        adam = self.optimizer[0]
        return {
            prefix + name: np.asarray(value)
            for prefix, held in zip(MOMENTS, (adam.mu, adam.nu), strict=True)
            for name, value in held.items()
        }


class Compiled(NamedTuple):
    """The compiled functions of one model and recipe."""

    step: Callable[..., Any]
    loss: Callable[..., Array]


@cache
def _compiled(spec: LMSpec, recipe: Recipe) -> Compiled:
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

    return Compiled(jax.jit(step, donate_argnums=0), jax.jit(loss))


def _optimizer(recipe: Recipe, rate: Array | float) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=recipe.beta1,
        b2=recipe.beta2,
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
        mask=lambda parameters: jax.tree.map(lambda parameter: parameter.ndim > 1, parameters),
    )
