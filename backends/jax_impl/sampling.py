"""Drawing the next token: temperature, then top-k, then top-p, as `Sampling` says."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from lyra.backends.protocol import Sampling

HEAD = 1024
"""Top-p orders so many of the most probable tokens, and the whole vocabulary only where they do not suffice."""


@jax.jit
def most_likely(scores: Array) -> Array:
    """The token of the highest score, int32 [B] for scores [B,V]; the first one of several."""
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


@partial(jax.jit, static_argnames="sampling")
def draw(scores: Array, sampling: Sampling, key: Array, step: int) -> Array:
    """A token for each row of scores [B,V], int32 [B], from the distribution that `filtered` leaves.

    `key` is that of the whole generation, `step` the number of tokens that it has made.
    """
    return jax.random.categorical(jax.random.fold_in(key, step), filtered(scores, sampling)).astype(jnp.int32)


def filtered(scores: Array, sampling: Sampling) -> Array:
    """Scores [B,V] as float32 over the temperature, the highest being 0; -inf for tokens that are left out."""
    scores = scores.astype(jnp.float32)
    scores = (scores - scores.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k is not None:
        # The smallest of them, not the last: XLA makes a sort of the whole vocabulary of a slice of the highest.
        scores = kept(scores, scores >= highest(scores, sampling.top_k).min(axis=-1, keepdims=True))
    if sampling.top_p < 1:
        scores = kept(scores, nucleus(jax.nn.softmax(scores), sampling.top_p))
    return scores


def kept(scores: Array, keep: Array) -> Array:
    """Scores [B,V], -inf where `keep` [B,V] is False."""
    return jnp.where(keep, scores, -jnp.inf)


def highest(values: Array, count: int) -> Array:
    """The highest `count` values of each row of [B,V], or all of them, in descending order."""
    return jax.lax.top_k(values, min(count, values.shape[-1]))[0]


def nucleus(probabilities: Array, top_p: float) -> Array:
    """Which tokens of [B,V] top-p keeps, bool [B,V]: the fewest most probable that reach it, and ties."""
    few = highest(probabilities, HEAD)
    least = jax.lax.cond(
        (few.sum(axis=-1) < top_p).any(),
        lambda: least_kept(jnp.sort(probabilities, descending=True), top_p),
        lambda: least_kept(few, top_p),
    )
    return probabilities >= least


def least_kept(ordered: Array, top_p: float) -> Array:
    """The smallest probability that top-p keeps, [B,1], of probabilities [B,N] in descending order.

    The first one is kept even where `top_p` is so small that float32 has 0 for it.
    """
    before = jnp.cumsum(ordered, axis=-1) - ordered
    kept_ones = jnp.where(before < top_p, ordered, jnp.inf)
    return jnp.minimum(kept_ones.min(axis=-1, keepdims=True), ordered[..., :1])
