"""The live cache: rotated keys, values, mask and positions in slots of a fixed capacity.

A capacity is a power of two, so that a cache that grows token by token changes its shape, and with it the compiled
function, only when it doubles. Slots from `length` on are free: whatever they hold is masked.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lyra.spec.array_types import Bool, Float, Int, Shaped

from .dtype import DTYPES, Given
from .visibility import LiveRule, visible_keys

SMALLEST = 16


class LiveKeys(NamedTuple):
    """The live keys that a call attends to: keys [B,Hkv,D,L], values [B,Hkv,L,D], mask and positions [B,L]."""

    keys: Float[Given, "B Hkv D L"]
    values: Float[Given, "B Hkv L D"]
    mask: Bool[Given, "B L"]
    positions: Int[Given, "B L"]

    def visible(self, positions: Array, window: Array | None, rule: LiveRule | None) -> Array:
        """Which of them queries at `positions` [B,T] see, as `visible_keys` says it. Clauses LIVE, SLIDING, MASKED."""
        return visible_keys(positions, self.positions, self.mask, window, rule)


SLOT_AXES = (3, 2, 1, 1)
"""Where the slots, one for each token, are in each array of LiveKeys."""


class LiveCache(NamedTuple):
    """Live keys and values of one layer.

    keys       [B,Hkv,D,C], rotated at their own positions (D before C: see partial_attention)
    values     [B,Hkv,C,D]
    mask       [B,C] bool; False for padding
    positions  [B,C] int32
    length     slots in use, the same for all rows: an int outside compiled code, int32 inside
    """

    keys: Array
    values: Array
    mask: Array
    positions: Array
    length: int | Array

    @property
    def batch(self) -> int:
        """Rows."""
        return self.mask.shape[0]

    @property
    def capacity(self) -> int:
        """Slots, used and free."""
        return self.mask.shape[1]

    def used(self) -> LiveKeys:
        """The live keys as they are, free slots masked."""
        shown = self.mask & (jnp.arange(self.capacity) < self.length)
        return LiveKeys(self.keys, self.values, shown, self.positions)

    def append(self, new: LiveKeys | None) -> tuple[LiveKeys, LiveCache]:
        """All live keys, old and new, and a new cache that holds them; with None the old ones and this cache.

        The old cache stays as it is (clause LIVE-4). There must be free slots for the new ones.
        """
        if new is None:
            return self.used(), self
        live = write(self.used(), new, self.length)
        return live, LiveCache(*live, length=self.length + new.mask.shape[1])

    def contents(self) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
        """KV heads and head_dim, mask and positions of its tokens: what `check_own_cache` asks for."""
        mask, positions = (np.asarray(part)[:, : int(self.length)] for part in (self.mask, self.positions))
        return (self.keys.shape[1], self.keys.shape[2]), mask, positions


def live_keys(
    k: Float[Given, "B T Hkv D"],
    v: Float[Given, "B T Hkv D"],
    mask: Bool[Given, "B T"],
    positions: Int[Given, "B T"],
) -> LiveKeys:
    """The tokens of a call as live keys: k, v [B,T,Hkv,D], k rotated; mask and positions [B,T]."""
    return LiveKeys(k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), mask, positions)


def first_slots(live: LiveKeys, count: int) -> LiveKeys:
    """The first of the slots."""
    if count == live.mask.shape[1]:
        return live
    return LiveKeys(*(lax.slice_in_dim(part, 0, count, axis=axis) for part, axis in zip(live, SLOT_AXES, strict=True)))


def write(slots: LiveKeys, new: LiveKeys, start: int | Int[Given, ""]) -> LiveKeys:
    """The slots with the new ones in them, from `start` on; in place where compiled code may use the old ones up.

    The condition always holds. It keeps the write apart from what reads the slots: XLA would take it into each reader
    and give each a copy of the whole cache to write to.
    """

    def written(slots: LiveKeys) -> LiveKeys:
        return LiveKeys(*map(partial(_put, start=start), slots, new, SLOT_AXES))

    made: LiveKeys = lax.cond(start >= 0, written, lambda slots: slots, slots)
    return made


def bucket(length: int) -> int:
    """The capacity for `length` tokens: the next power of two, at least 16."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def empty_keys(
    batch: int, kv_heads: int, head_dim: int, slots: int, dtype: np.dtype[Any] = DTYPES["float32"]
) -> LiveKeys:
    """Slots with nothing in them: NumPy arrays, which the first compiled call takes to the device.

    Making them with jnp.zeros would compile for every shape.
    """
    zeros: Any = np.zeros
    return LiveKeys(
        keys=zeros((batch, kv_heads, head_dim, slots), dtype),
        values=zeros((batch, kv_heads, slots, head_dim), dtype),
        mask=zeros((batch, slots), bool),
        positions=zeros((batch, slots), np.int32),
    )


def empty_cache(
    batch: int, kv_heads: int, head_dim: int, capacity: int, dtype: np.dtype[Any] = DTYPES["float32"]
) -> LiveCache:
    """A cache with nothing in it."""
    return LiveCache(*empty_keys(batch, kv_heads, head_dim, capacity, dtype), length=0)


def _put(
    slots: Shaped[Given, "*axes"], new: Shaped[Given, "*tokens"], axis: int, start: int | Int[Given, ""]
) -> Shaped[Array, "*axes"]:
    return lax.dynamic_update_slice_in_dim(slots, new, start, axis, allow_negative_indices=False)


@partial(jax.jit, static_argnames="capacity")
def _pad(cache: LiveCache, capacity: int) -> LiveCache:
    extra = capacity - cache.capacity
    return LiveCache(
        keys=jnp.pad(cache.keys, ((0, 0), (0, 0), (0, 0), (0, extra))),
        values=jnp.pad(cache.values, ((0, 0), (0, 0), (0, extra), (0, 0))),
        mask=jnp.pad(cache.mask, ((0, 0), (0, extra))),
        positions=jnp.pad(cache.positions, ((0, 0), (0, extra))),
        length=cache.length,
    )


def with_room(cache: LiveCache, tokens: int) -> LiveCache:
    """The same cache with free slots for `tokens` more."""
    needed = bucket(int(cache.length) + tokens)
    if needed <= cache.capacity:
        return cache
    wider: LiveCache = _pad(cache, needed)
    return wider._replace(length=cache.length)


def crop(cache: LiveCache, length: int) -> LiveCache:
    """The first `length` tokens: later slots count as free, nothing is copied. Clause BATCH-5."""
    return cache._replace(length=length)


@jax.jit
def _take_rows(cache: LiveCache, rows: Int[Given, " B"]) -> LiveCache:
    keys, values, mask, positions = (jnp.take(part, rows, axis=0, mode="clip") for part in cache[:4])
    return LiveCache(keys, values, mask, positions, cache.length)


def reorder(cache: LiveCache, rows: Int[np.ndarray, " B"]) -> LiveCache:
    """The given rows of the cache, in the given order, repeats allowed. Clause BATCH-5."""
    taken: LiveCache = _take_rows(cache, rows)
    return taken._replace(length=cache.length)
