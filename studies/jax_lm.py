"""The studies' language model in JAX, on the backend's GroupedQueryAttention, and one step of its training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from lyra.backends.jax_impl.cache import LiveCache
from lyra.backends.jax_impl.gemma3 import Linear
from lyra.backends.jax_impl.grouped import GroupedQueryAttention

from .language_model import LMSpec
from .training import MOMENTS, Recipe

Weights = dict[str, Array]
"""Parameters by name."""

ROWS = 32
"""Windows that are evaluated at once."""


class RMSNorm(nnx.Module):
    """x · rsqrt(mean(x²) + eps) · weight over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """x [..., width] -> the same shape."""
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.weight[...]


class GatedMLP(nnx.Module):
    """x [B,T,E] -> down(silu(gate(x)) · up(x)) [B,T,E]. Source: Shazeer 2020, "GLU Variants"."""

    def __init__(self, spec: LMSpec, *, rngs: nnx.Rngs) -> None:
        self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size, rngs=rngs)
        self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, rngs=rngs)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [B,T,E] -> [B,T,E]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention and gated MLP, each behind a norm and added to what comes in."""

    def __init__(self, spec: LMSpec, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = GroupedQueryAttention.from_spec(spec.attention, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = GatedMLP(spec, rngs=rngs)

    def __call__(self, x: Array, cache: LiveCache | None) -> tuple[Array, LiveCache]:
        """x [B,T,E] -> [B,T,E], and the cache with the call's tokens."""
        attended, cache = self.self_attn(self.input_layernorm(x), cache=cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class LanguageModel(nnx.Module):
    """The model of `LMSpec`; weights carry the names of Hugging Face's LlamaModel."""

    def __init__(self, spec: LMSpec, *, rngs: nnx.Rngs) -> None:
        self.embed_tokens = Linear(spec.hidden_size, spec.vocab_size, rngs=rngs)  # tied: it also gives the logits
        self.layers = nnx.List(DecoderLayer(spec, rngs=rngs) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)

    def __call__(self, tokens: Array, caches: Sequence[LiveCache] | None = None) -> tuple[Array, list[LiveCache]]:
        """tokens int32 [B,T] -> logits [B,T,V], and every layer's cache with the call's tokens."""
        x, grown = self.embed_tokens.weight[...][tokens], []
        for number, layer in enumerate(self.layers):
            x, cache = layer(x, None if caches is None else caches[number])
            grown.append(cache)
        return self.embed_tokens(self.norm(x)), grown


class TrainedModel:
    """A Learner: the model and optax.adamw, which decays matrices only."""

    def __init__(
        self,
        spec: LMSpec,
        recipe: Recipe,
        weights: Mapping[str, np.ndarray],
        moments: Mapping[str, np.ndarray] | None,
        done: int,
    ) -> None:
        self.compiled = _compiled(spec, recipe)
        self.parameters: Weights = {name: jnp.asarray(value) for name, value in weights.items()}
        self.optimizer: Any = _optimizer(recipe, 0.0).init(self.parameters)
        if done and moments is not None:
            mean, square = ({name: jnp.asarray(moments[prefix + name]) for name in weights} for prefix in MOMENTS)
            adam = self.optimizer[0]._replace(count=jnp.asarray(done, jnp.int32), mu=mean, nu=square)
            self.optimizer = (adam, *self.optimizer[1:])

    def step(self, tokens: np.ndarray, learning_rate: float) -> tuple[float, float]:
        """One step of AdamW on windows [rows, window + 1]: the loss before it, and the gradient's norm."""
        state = self.parameters, self.optimizer
        (self.parameters, self.optimizer), loss, norm = self.compiled.step(
            state, tokens.astype(np.int32), np.float32(learning_rate)
        )
        return float(loss), float(norm)

    def loss(self, tokens: np.ndarray) -> float:
        """Mean cross-entropy of windows [N, window + 1]."""
        total = 0.0
        for start in range(0, len(tokens), ROWS):
            part = tokens[start : start + ROWS].astype(np.int32)
            total += float(self.compiled.loss(self.parameters, part)) * len(part)
        return total / len(tokens)

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
    build = builder(spec)

    def loss(parameters: Weights, tokens: Array) -> Array:
        logits, _ = build(parameters)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def step(state: tuple[Weights, Any], tokens: Array, rate: Array) -> tuple[tuple[Weights, Any], Array, Array]:
        parameters, optimizer = state
        value, gradients = jax.value_and_grad(loss)(parameters, tokens)
        norm = optax.tree.norm(gradients)
        clipped, _ = optax.clip_by_global_norm(recipe.clip).update(gradients, optax.EmptyState())
        updates, optimizer = _optimizer(recipe, rate).update(clipped, optimizer, parameters)
        return (optax.apply_updates(parameters, updates), optimizer), value, norm

    return Compiled(jax.jit(step, donate_argnums=0), jax.jit(loss))


def builder(spec: LMSpec) -> Callable[[Weights], LanguageModel]:
    """A function that makes the model of its weights, in compiled code too."""
    abstract = nnx.eval_shape(lambda: LanguageModel(spec, rngs=nnx.Rngs(0)))
    graph, parameters = nnx.split(abstract, nnx.Param)
    places = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(parameters)}

    def build(weights: Weights) -> LanguageModel:
        filled = [(path, leaf.replace(weights[name])) for name, (path, leaf) in places.items()]
        made: LanguageModel = nnx.merge(graph, nnx.from_flat_state(filled))
        return made

    return build


def _optimizer(recipe: Recipe, rate: Array | float) -> optax.GradientTransformation:
    return optax.adamw(
        rate,
        b1=recipe.beta1,
        b2=recipe.beta2,
        eps=recipe.adam_eps,
        weight_decay=recipe.weight_decay,
        mask=lambda parameters: jax.tree.map(lambda one: one.ndim > 1, parameters),
    )
