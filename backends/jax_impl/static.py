"""The static context of one layer: keys rotated once, in the layout the attention core reads, and attention to it.

Clauses STORED, POSITION and STATIC.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lyra.spec.array_types import Bool, Float, Int
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer

from .dtype import DTYPES, Given, enter
from .heads import LyraHeads, fold_batch, select, spread, unfold_batch
from .partial import Partial, add_columns, partial_attention
from .rope import cos_sin, rotate
from .sharding import ONE_DEVICE, ShardingConfig

TILE = 1 << 18
"""Contexts are taken in by tiles of slots of about this many values, so that attaching needs little memory beside."""


class PlacedStatic(NamedTuple):
    """A StaticLayer whose positions are those its keys are to be rotated at; mask None where every slot is visible.

    k, v [Bc,Hs,S,D]; positions [Bc,S] int32; mask [Bc,S] bool or None.
    """

    k: Float[Given, "Bc Hs S D"]
    v: Float[Given, "Bc Hs S D"]
    positions: Int[Given, "Bc S"]
    mask: Bool[Given, "Bc S"] | None


class StaticKV(NamedTuple):
    """Ready to be attended to: keys (rotated) and values [Bc,Hs,D,S], slots last in both since XLA has no strides, see
    `add_columns`; visible bool [Bc,S], or None where every slot is.
    """

    keys: Float[Array, "Bc Hs D S"]
    values: Float[Array, "Bc Hs D S"]
    visible: Bool[Array, "Bc S"] | None


def place_static(
    spec: AttentionSpec, static: StaticLayer, dtype: np.dtype[Any] = DTYPES["float32"]
) -> PlacedStatic | None:
    """Where static keys are rotated when live tokens stay at t; None for an empty context. Clause POSITION.

    "overlay": at their own position j. "continue": at j − P, which is the same as moving live tokens by P, since
    RoPE is relative; P is one more than the row's highest visible position. Masked slots go to 0. Keys and values are
    rounded to `dtype`.
    """
    if static.mask.shape[1] == 0:
        return None
    positions = np.where(static.mask, static.positions, 0)
    if spec.static.positions == "continue":
        highest = np.where(static.mask, static.positions, -1).max(axis=1, keepdims=True)
        positions = np.where(static.mask, positions - (highest + 1), 0)
    mask = None if static.mask.all() else static.mask
    return PlacedStatic(enter(static.k, dtype), enter(static.v, dtype), positions.astype(np.int32), mask)


def rotate_keys(
    k: Float[Array, "Bc Hs S D"], positions: Int[Array, "Bc S"], frequencies: Float[Given, " half"] | None
) -> Float[Array, "Bc Hs D S"]:
    """Stored keys [Bc,Hs,S,D], turned to positions [Bc,S], as [Bc,Hs,D,S].

    The axes are exchanged first: compiled, keys are then turned on their way to the new layout, without a copy between.
    """
    k = k.swapaxes(2, 3)
    if frequencies is not None:
        cos, sin = (table.swapaxes(1, 2)[:, None] for table in cos_sin(positions, frequencies))
        k = rotate(k, cos, sin, axis=2)
    return k


def turn_values(v: Float[Array, "Bc Hs S D"]) -> Float[Array, "Bc Hs D S"]:
    """Stored values [Bc,Hs,S,D] as [Bc,Hs,D,S]."""
    return v.swapaxes(2, 3)


_rotate_keys, _turn_values = jax.jit(rotate_keys), jax.jit(turn_values)
_write = jax.jit(partial(lax.dynamic_update_slice_in_dim, axis=3), donate_argnums=0)


def rotate_static(placed: PlacedStatic, frequencies: Float[Given, " half"] | None) -> StaticKV:
    """Rotate static keys from their stored values. Clause STORED-2."""
    k = rotate_keys(jnp.asarray(placed.k), jnp.asarray(placed.positions), frequencies)
    return StaticKV(k, turn_values(jnp.asarray(placed.v)), None if placed.mask is None else jnp.asarray(placed.mask))


def prepare_static(
    placed: PlacedStatic, frequencies: Float[Given, " half"] | None, *, sharding: ShardingConfig = ONE_DEVICE
) -> StaticKV:
    """The same for a whole model, once for a context, on its devices.

    One device is given a tile of slots at a time, so that little of a context is in memory twice; several share the
    slots.
    """
    place, slots = sharding.place_slots, placed.positions.shape[1]
    length = _tile_of(placed.k.shape) if sharding.mesh is None else slots
    tiles = [slice(start, start + length) for start in range(0, slots, length)]
    turned = (
        _rotate_keys(place(placed.k[:, :, some]), place(placed.positions[:, some]), frequencies) for some in tiles
    )
    k, v = _joined(turned, slots), _joined((_turn_values(place(placed.v[:, :, some])) for some in tiles), slots)
    return StaticKV(keys=k, values=v, visible=None if placed.mask is None else place(placed.mask))


def _tile_of(shape: tuple[int, ...]) -> int:
    """How many slots of k [Bc,Hs,S,D] to take at a time: S, halved until it is odd or they hold TILE values."""
    rows, heads, length, width = shape
    while rows * heads * length * width > TILE and length % 2 == 0:
        length //= 2
    return length


def _joined(tiles: Iterable[Array], slots: int) -> Float[Array, "Bc Hs D {slots}"]:
    """Tiles [Bc,Hs,D,·] of one length side by side; each is made when the one before is in its place."""
    rest = iter(tiles)
    first = next(rest)
    length = first.shape[3]
    if length == slots:
        return jax.block_until_ready(first)
    whole = _write(jnp.zeros((*first.shape[:3], slots), first.dtype), first, 0)
    for start, tile in zip(range(length, slots, length), rest, strict=True):
        whole = _write(jax.block_until_ready(whole), tile, start)
    return jax.block_until_ready(whole)


def static_attention(
    queries: Float[Array, "B Hkv R T D"],
    static: StaticKV,
    heads: LyraHeads,
    scale: Float[Given, ""],
    softcap: Float[Given, ""] | None,
    *,
    sharding: ShardingConfig = ONE_DEVICE,
) -> Partial:
    """Attention of the Lyra heads to the static keys; empty for vanilla heads. Clauses STATIC-2, STATIC-3, SPLIT-4.

    queries [B,Hkv,R,T,D], folded; gives a Partial of the same axes. Each context is read once for all rows that share
    it (clause BATCH-4). Devices that hold other slots add theirs.
    """
    queries = select(queries, heads)
    visible = None if static.visible is None else static.visible[:, None, None, None, :]
    attend = sharding.attend_slots(partial(partial_attention, add=add_columns))
    folded = fold_batch(queries, len(static.keys))
    part = attend(folded, static.keys, static.values, visible, scale, softcap)
    return spread(Partial(*(unfold_batch(field, queries.shape[2]) for field in part)), heads)
