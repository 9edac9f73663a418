"""The static context of one layer on the device: keys rotated once, in the layout the attention core reads."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer

from .dtype import DTYPES, enter
from .heads import SplitArrays, select_readers, spread_readers
from .partial import Partial, add_columns, partial_attention
from .rope import cos_sin, rotate
from .sharding import ShardingConfig

BLOCK = 1 << 18
"""Contexts are taken in by blocks of slots of about this many values, so that attaching needs little memory beside."""


class PlacedStatic(NamedTuple):
    """A StaticLayer whose positions are those its keys are to be rotated at; mask None where every slot is visible.

    k, v [Bc,G,S,D]; positions [Bc,S] int32; mask [Bc,S] bool or None.
    """

    k: np.ndarray | Array
    v: np.ndarray | Array
    positions: np.ndarray | Array
    mask: np.ndarray | Array | None


class StaticKV(NamedTuple):
    """Ready to be attended to: keys rotated and values, [Bc,G,D,S] both, see `add_columns`; mask [Bc,S] or None."""

    keys: Array
    values: Array
    mask: Array | None


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


def rotate_keys(k: Array, positions: Array, frequencies: Array | None) -> Array:
    """Stored keys [Bc,G,S,D], turned to positions [Bc,S], as [Bc,G,D,S].

    The axes are exchanged first: compiled, keys are then turned on their way to the new layout, without a copy between.
    """
    k = k.swapaxes(2, 3)
    if frequencies is not None:
        cos, sin = (table.swapaxes(1, 2)[:, None] for table in cos_sin(positions, frequencies))
        k = rotate(k, cos, sin, axis=2)
    return k


def turn_values(v: Array) -> Array:
    """Stored values [Bc,G,S,D] as [Bc,G,D,S]."""
    return v.swapaxes(2, 3)


_rotate_keys, _turn_values = jax.jit(rotate_keys), jax.jit(turn_values)
_write = jax.jit(partial(lax.dynamic_update_slice_in_dim, axis=3), donate_argnums=0)


def rotate_static(placed: PlacedStatic, frequencies: Array | None) -> StaticKV:
    """Rotate static keys from their stored values. Clause STORED-2."""
    k = rotate_keys(jnp.asarray(placed.k), jnp.asarray(placed.positions), frequencies)
    return StaticKV(k, turn_values(jnp.asarray(placed.v)), None if placed.mask is None else jnp.asarray(placed.mask))


def prepare_static(placed: PlacedStatic, frequencies: Array | None, sharding: ShardingConfig) -> StaticKV:
    """The same for a whole model, once for a context, on its devices.

    One device is given a few slots at a time, so that little of a context is in memory twice; several share the slots.
    """
    place, slots = sharding.place_slots, placed.positions.shape[1]
    length = _block_of(placed.k.shape) if sharding.mesh is None else slots
    blocks = [slice(start, start + length) for start in range(0, slots, length)]
    turned = (
        _rotate_keys(place(placed.k[:, :, some]), place(placed.positions[:, some]), frequencies) for some in blocks
    )
    k, v = _joined(turned, slots), _joined((_turn_values(place(placed.v[:, :, some])) for some in blocks), slots)
    return StaticKV(keys=k, values=v, mask=None if placed.mask is None else place(placed.mask))


def _block_of(shape: tuple[int, ...]) -> int:
    """How many slots of k [Bc,G,S,D] to take at a time: S, halved until it is odd or they hold BLOCK values."""
    rows, groups, length, width = shape
    while rows * groups * length * width > BLOCK and length % 2 == 0:
        length //= 2
    return length


def _joined(blocks: Iterable[Array], slots: int) -> Array:
    """Blocks [Bc,G,D,·] of one length side by side; each is made when the one before is in its place."""
    rest = iter(blocks)
    first = next(rest)
    length = first.shape[3]
    if length == slots:
        return jax.block_until_ready(first)
    whole = _write(jnp.zeros((*first.shape[:3], slots), first.dtype), first, 0)
    for start, block in zip(range(length, slots, length), rest, strict=True):
        whole = _write(jax.block_until_ready(whole), block, start)
    return jax.block_until_ready(whole)


def static_attention(
    query: Array,
    static: StaticKV,
    split: SplitArrays,
    tokens: int,
    scale: Array,
    softcap: Array | None,
    sharding: ShardingConfig,
) -> Partial:
    """Attention of the Lyra heads to the static keys; empty for vanilla heads. Clauses STATIC-2, STATIC-3, SPLIT-4.

    query [B,Hkv,R·T,D], folded; gives a Partial of the same axes. A context of batch 1 is read once for the whole
    batch, whose rows become part of the query axis. Clause BATCH-4.
    """
    selected = select_readers(query, split)
    batch, groups, queries, head_dim = selected.shape
    shared = static.values.shape[0] == 1
    if shared:
        selected = selected.swapaxes(0, 1).reshape(1, groups, batch * queries, head_dim)
    visible = None if static.mask is None else static.mask[:, None, None, :]
    attend = sharding.attend_slots(partial(partial_attention, add=add_columns))
    found = attend(selected, static.keys, static.values, visible, scale, softcap)
    if shared:
        found = Partial(*(part.reshape(groups, batch, queries, -1).swapaxes(0, 1) for part in found))
    return spread_readers(found, split, tokens)
