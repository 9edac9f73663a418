"""The live cache: rotated keys, values, mask and positions in slots of a fixed capacity.

A capacity is a power of two, so that a cache that grows token by token changes its shape, and with it the compiled
function, only when it doubles. Slots from `length` on are free: whatever they hold is masked.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lyra.spec.errors import InputError

SMALLEST = 16


class LiveCache(NamedTuple):
    """Live keys and values of one layer.

    keys       [B,Hkv,D,C] float32, rotated at their own positions (D before C: see partial_attention)
    values     [B,Hkv,C,D] float32
    mask       [B,C] bool; False for padding
    positions  [B,C] int32
    length     slots in use, the same for all rows: an int outside compiled code, int32 inside
    """

    keys: Array | np.ndarray
    values: Array | np.ndarray
    mask: Array | np.ndarray
    positions: Array | np.ndarray
    length: int | Array

    @property
    def batch(self) -> int:
        """Rows."""
        return self.mask.shape[0]

    @property
    def capacity(self) -> int:
        """Slots, used and free."""
        return self.mask.shape[1]


def bucket(length: int) -> int:
    """The capacity for `length` tokens: the next power of two, at least 16."""
    return max(SMALLEST, 1 << (length - 1).bit_length()) if length > 0 else SMALLEST


def empty_cache(batch: int, kv_heads: int, head_dim: int, capacity: int) -> LiveCache:
    """A cache with nothing in it: NumPy arrays, since making them on the device would compile for every shape."""
    return LiveCache(
        keys=np.zeros((batch, kv_heads, head_dim, capacity), np.float32),
        values=np.zeros((batch, kv_heads, capacity, head_dim), np.float32),
        mask=np.zeros((batch, capacity), bool),
        positions=np.zeros((batch, capacity), np.int32),
        length=0,
    )


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
    needed = bucket(cache.length + tokens)
    return cache if needed <= cache.capacity else _pad(cache, needed)._replace(length=cache.length)


def append(cache: LiveCache, k: Array, v: Array, mask: Array, positions: Array) -> LiveCache:
    """A new cache with the tokens of a call behind the old ones; the old cache stays as it is. Clause LIVE-4.

    k, v [B,T,Hkv,D], k rotated; mask and positions [B,T]. The capacity must have room for T more tokens.
    """
    used = jnp.arange(cache.capacity) < cache.length
    return LiveCache(
        keys=lax.dynamic_update_slice_in_dim(cache.keys, k.transpose(0, 2, 3, 1), cache.length, axis=3),
        values=lax.dynamic_update_slice_in_dim(cache.values, v.swapaxes(1, 2), cache.length, axis=2),
        mask=lax.dynamic_update_slice_in_dim(cache.mask & used, mask, cache.length, axis=1),
        positions=lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.length, axis=1),
        length=cache.length + mask.shape[1],
    )


def crop(cache: LiveCache, length: int) -> LiveCache:
    """The first `length` tokens: later slots count as free, nothing is copied. Clause BATCH-5. Raises InputError."""
    if not 0 <= length <= cache.length:
        raise InputError(
            f"crop: length is {length}; the cache holds {cache.length} tokens, so give 0 to {cache.length}"
        )
    return cache._replace(length=int(length))


@jax.jit
def _take_rows(cache: LiveCache, rows: Array) -> LiveCache:
    parts = (jnp.take(part, rows, axis=0, mode="clip") for part in cache[:-1])
    return LiveCache(*parts, length=cache.length)


def reorder(cache: LiveCache, rows: np.ndarray) -> LiveCache:
    """The given rows of the cache, in the given order, repeats allowed. Clause BATCH-5. Raises InputError."""
    if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
        raise InputError(f"reorder: rows has shape {rows.shape} and dtype {rows.dtype}; expected integers [rows]")
    if rows.size and (rows.min() < 0 or rows.max() >= cache.batch):
        raise InputError(f"reorder: rows are {rows.tolist()}; the cache has rows 0 to {cache.batch - 1}")
    return _take_rows(cache, rows)._replace(length=cache.length)
