"""The one attention core: softmax over a part of the keys, kept open so that parts can be merged.

Axes: N batch, H KV heads, R query heads of a KV head, T tokens, L keys, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from lyra.spec.array_types import Bool, Float, Shaped

from .dtype import Given

HIGHEST = lax.Precision.HIGHEST

SCORES_PER_TILE = 1 << 22
"""Queries are taken in tiles of about this many scores, so that long prefills need little memory."""


class Partial(NamedTuple):
    """Attention over some of the keys, before the division by the sum. All float32.

    out      [N,H,R,T,D]  Σ exp(score − max) · v
    maximum  [N,H,R,T,1]  the greatest visible score, −inf where no key is visible
    total    [N,H,R,T,1]  Σ exp(score − max), 0 where no key is visible
    """

    out: Float[Array, "N H R T D"]
    maximum: Float[Array, "N H R T 1"]
    total: Float[Array, "N H R T 1"]


Add = Callable[[Array, Array], Array]
"""Weights [N,H,R·T,L] times values, in the layout that a function of this kind is for: [N,H,R·T,D]."""


def add_rows(weights: Float[Array, "N H Q L"], values: Float[Given, "N H L D"]) -> Float[Array, "N H Q D"]:
    """Values [N,H,L,D]: a row for each key, as live tokens are written."""
    return jnp.matmul(weights, values, precision=HIGHEST, preferred_element_type=jnp.float32)


def add_columns(weights: Float[Array, "N H Q L"], values: Float[Given, "N H D L"]) -> Float[Array, "N H Q D"]:
    """Values [N,H,D,L]: a column for each key, which takes XLA a tenth to a fifth less time over thousands of keys.

    The barrier keeps the product as it is written. XLA would turn it about, and without rows that takes four times as
    long for several rows of the batch.
    """
    turned = jnp.einsum("nhdl,nhql->nhdq", values, weights, precision=HIGHEST, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(turned).swapaxes(2, 3)


def partial_attention(
    query: Float[Array, "N H R T D"],
    keys: Float[Given, "N H D L"],
    values: Float[Given, "N H ..."],
    visible: Bool[Given, "#N #H #R #T L"] | None,
    scale: Float[Given, ""] | float,
    softcap: Float[Given, ""] | float | None = None,
    *,
    add: Add = add_rows,
) -> Partial:
    """Attend to some keys. Clauses SCALE, STATIC and MASKED.

    query [N,H,R,T,D]; keys [N,H,D,L], keys along the last axis, which a CPU multiplies fastest for few queries;
    values as `add` takes them; visible broadcasts to [N,H,R,T,L], None meaning that every key is visible.

    Masked scores are selected away, never added to or multiplied, so that nothing a masked slot holds has influence.
    """
    batch, kv_heads, group, tokens, _ = query.shape
    tile = max(1, SCORES_PER_TILE // max(1, batch * kv_heads * group * keys.shape[-1]))
    if tokens <= tile:
        return _tile(query, keys, values, visible, scale, softcap, add)

    def attend(rows: tuple[Array, Array | None]) -> Partial:
        return _tile(rows[0], keys, values, rows[1], scale, softcap, add)

    if visible is not None and visible.shape[3] > 1:
        parts = lax.map(attend, (_tiles(query, tile), _tiles(visible, tile)))
    else:
        parts = lax.map(lambda rows: attend((rows, visible)), _tiles(query, tile))
    whole = (jnp.moveaxis(part, 0, 3).reshape(*query.shape[:3], -1, part.shape[-1]) for part in parts)
    return Partial(*(part[:, :, :, :tokens] for part in whole))


def _tiles(rows: Shaped[Given, "N H R T axis"], size: int) -> Shaped[Array, "tiles N H R {size} axis"]:
    """[N,H,R,T,·] cut along T, with zeros behind the last ones: [tiles,N,H,R,size,·]."""
    count = -(-rows.shape[3] // size)
    padded = jnp.pad(rows, ((0, 0), (0, 0), (0, 0), (0, count * size - rows.shape[3]), (0, 0)))
    return jnp.moveaxis(padded.reshape(*rows.shape[:3], count, size, rows.shape[4]), 3, 0)


def nothing(query: Float[Array, "N H R T D"]) -> Partial:
    """The Partial of queries [...,T,D] over no key at all."""
    column = jnp.zeros((*query.shape[:-1], 1), jnp.float32)
    return Partial(jnp.zeros(query.shape, jnp.float32), column - jnp.inf, column)


def masked_scores(
    query: Float[Array, "N H R T D"],
    keys: Float[Given, "N H D L"],
    visible: Bool[Given, "#N #H #R #T L"] | None,
    scale: Float[Given, ""] | float,
    softcap: Float[Given, ""] | float | None = None,
) -> Float[Array, "N H R T L"]:
    """The scores [N,H,R,T,L] of query over keys, as `partial_attention` takes them, in float32; -inf where a key is
    hidden.
    """
    return _flat_scores(query, keys, visible, scale, softcap).reshape(*query.shape[:4], -1)


def _flat_scores(
    query: Float[Array, "N H R T D"],
    keys: Float[Given, "N H D L"],
    visible: Bool[Given, "#N #H #R #T L"] | None,
    scale: Float[Given, ""] | float,
    softcap: Float[Given, ""] | float | None,
) -> Float[Array, "N H R*T L"]:
    """The same as [N,H,R·T,L], as the product of each KV head makes them: XLA fuses what follows better than over R and
    T apart.
    """
    flat = lax.collapse(query, 2, 4)
    scores = jnp.matmul(flat, keys, precision=HIGHEST, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if visible is not None:
        visible = _flat_visible(visible, query.shape[2])
        scores = jnp.where(visible, scores, -jnp.inf)
    return scores


def _flat_visible(visible: Bool[Given, "N H R T L"], group: int) -> Bool[Array, "N H flat L"]:
    """[N,H,R,T,L] as [N,H,R·T,L], any of the axes but L being 1 or all; R is `group`."""
    if visible.shape[2] == 1 and visible.shape[3] > 1:
        visible = jnp.broadcast_to(visible, (*visible.shape[:2], group, *visible.shape[3:]))
    return lax.collapse(visible, 2, 4)


def _tile(
    query: Float[Array, "N H R T D"],
    keys: Float[Given, "N H D L"],
    values: Float[Given, "N H ..."],
    visible: Bool[Given, "#N #H #R #T L"] | None,
    scale: Float[Given, ""] | float,
    softcap: Float[Given, ""] | float | None,
    add: Add,
) -> Partial:
    scores = _flat_scores(query, keys, visible, scale, softcap)
    maximum = jnp.max(scores, axis=-1, keepdims=True)
    # The largest score cancels out of the result, so no gradient has to flow through it.
    maximum = lax.stop_gradient(maximum)
    weights = jnp.exp(scores - finite_maximum(maximum))
    flat = Partial(add(weights, values), maximum, jnp.sum(weights, axis=-1, keepdims=True))
    return Partial(*(part.reshape(*query.shape[:4], -1) for part in flat))


def merge(a: Partial, b: Partial) -> Partial:
    """The Partial over the keys of both, which must be disjoint: one softmax. Clause STATIC-1."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    weight_a = jnp.exp(a.maximum - finite_maximum(maximum))
    weight_b = jnp.exp(b.maximum - finite_maximum(maximum))
    return Partial(a.out * weight_a + b.out * weight_b, maximum, a.total * weight_a + b.total * weight_b)


def keep(partial: Partial, rows: Bool[Given, "*rows"]) -> Partial:
    """The Partial where `rows` (bool, broadcastable to maximum) is True, and that of no visible key elsewhere."""
    return Partial(
        jnp.where(rows, partial.out, 0.0),
        jnp.where(rows, partial.maximum, -jnp.inf),
        jnp.where(rows, partial.total, 0.0),
    )


def finish(partial: Partial) -> Float[Array, "N H R T D"]:
    """Normalise: [N,H,R,T,D] float32, exactly 0 where no key was visible. Clause MASKED-2."""
    empty = partial.total == 0.0
    return jnp.where(empty, 0.0, partial.out / jnp.where(empty, 1.0, partial.total))


def finite_maximum(maximum: Float[Array, "*rows 1"]) -> Float[Array, "*rows 1"]:
    """A maximum that may be subtracted: −inf, no key visible, becomes 0 (−inf − −inf would be NaN)."""
    return jnp.where(jnp.isneginf(maximum), 0.0, maximum)
