"""The one attention core: softmax over a part of the keys, kept open so that parts can be merged.

Axes: N batch, G KV heads, Q queries of a group (R heads times T tokens), K keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

HIGHEST = lax.Precision.HIGHEST

SCORES_PER_BLOCK = 1 << 22
"""Queries are taken in blocks of about this many scores, so that long prefills need little memory."""


class Partial(NamedTuple):
    """Attention over some of the keys, before the division by the sum. All float32.

    out      [N,G,Q,D]  Σ exp(score − max) · v
    maximum  [N,G,Q,1]  the greatest visible score, −inf where no key is visible
    total    [N,G,Q,1]  Σ exp(score − max), 0 where no key is visible
    """

    out: Array
    maximum: Array
    total: Array


Add = Callable[[Array, Array], Array]
"""Weights [N,G,Q,K] times values, in the layout that a function of this kind is for: [N,G,Q,D]."""


def add_rows(weights: Array, values: Array) -> Array:
    """Values [N,G,K,D]: a row for each key, as live tokens are written."""
    return jnp.matmul(weights, values, precision=HIGHEST, preferred_element_type=jnp.float32)


def add_columns(weights: Array, values: Array) -> Array:
    """Values [N,G,D,K]: a column for each key, which takes XLA a tenth to a fifth less time over thousands of keys.

    The barrier keeps the product as it is written. XLA would turn it about, and without rows that takes four times as
    long for several rows of the batch.
    """
    turned = jnp.einsum("ngdk,ngqk->ngdq", values, weights, precision=HIGHEST, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(turned).swapaxes(2, 3)


def partial_attention(
    query: Array,
    keys: Array,
    values: Array,
    visible: Array | None,
    scale: Array,
    softcap: Array | None,
    add: Add = add_rows,
) -> Partial:
    """Attend to some keys. Clauses SCALE, STATIC and MASKED.

    query [N,G,Q,D]; keys [N,G,D,K], keys along the last axis, which a CPU multiplies fastest for few queries;
    values as `add` takes them; visible broadcasts to [N,G,Q,K], None meaning that every key is visible.

    Masked scores are selected away, never added to or multiplied, so that nothing a masked slot holds has influence.
    """
    batch, groups, queries, _ = query.shape
    block = max(1, SCORES_PER_BLOCK // max(1, batch * groups * keys.shape[-1]))
    if queries <= block:
        return _block(query, keys, values, visible, scale, softcap, add)

    def attend(rows: tuple[Array, Array | None]) -> Partial:
        return _block(rows[0], keys, values, rows[1], scale, softcap, add)

    if visible is not None and visible.shape[2] > 1:
        parts = lax.map(attend, (_blocks(query, block), _blocks(visible, block)))
    else:
        parts = lax.map(lambda rows: attend((rows, visible)), _blocks(query, block))
    return Partial(
        *(jnp.moveaxis(part, 0, 2).reshape(batch, groups, -1, part.shape[-1])[:, :, :queries] for part in parts)
    )


def _blocks(rows: Array, size: int) -> Array:
    """[N,G,Q,·] cut along Q, with zeros behind the last ones: [blocks,N,G,size,·]."""
    count = -(-rows.shape[2] // size)
    padded = jnp.pad(rows, ((0, 0), (0, 0), (0, count * size - rows.shape[2]), (0, 0)))
    return jnp.moveaxis(padded.reshape(*rows.shape[:2], count, size, rows.shape[3]), 2, 0)


def masked_scores(query: Array, keys: Array, visible: Array | None, scale: Array, softcap: Array | None) -> Array:
    """The scores [N,G,Q,K] of queries over keys, as `partial_attention` takes them, float32; -inf for hidden keys."""
    scores = jnp.matmul(query, keys, precision=HIGHEST, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    return scores


def _block(
    query: Array, keys: Array, values: Array, visible: Array | None, scale: Array, softcap: Array | None, add: Add
) -> Partial:
    scores = masked_scores(query, keys, visible, scale, softcap)
    maximum = jnp.max(scores, axis=-1, keepdims=True)
    # The largest score cancels out of the result, so no gradient has to flow through it.
    maximum = lax.stop_gradient(maximum)
    weights = jnp.exp(scores - finite_maximum(maximum))
    out = add(weights, values)
    return Partial(out, maximum, jnp.sum(weights, axis=-1, keepdims=True))


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the keys of both parts, as one softmax. Clause STATIC-1."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    weight_a = jnp.exp(a.maximum - finite_maximum(maximum))
    weight_b = jnp.exp(b.maximum - finite_maximum(maximum))
    return Partial(a.out * weight_a + b.out * weight_b, maximum, a.total * weight_a + b.total * weight_b)


def finish(partial: Partial) -> Array:
    """The heads' outputs [N,G,Q,D]; exactly 0 where no key was visible. Clause MASKED-2."""
    empty = partial.total == 0.0
    return jnp.where(empty, 0.0, partial.out / jnp.where(empty, 1.0, partial.total))


def finite_maximum(maximum: Array) -> Array:
    """A maximum that may be subtracted: −inf, no key visible, becomes 0 (−inf − −inf would be NaN)."""
    return jnp.where(jnp.isneginf(maximum), 0.0, maximum)
