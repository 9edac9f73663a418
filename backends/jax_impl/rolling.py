"""The cache of a sliding-window layer in a whole model: a ring of the last W tokens, whatever the length of the text.

It serves callers whose real tokens stand side by side, as they do behind left padding: then the window of W positions
lies within the last W slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .cache import SLOT_AXES, LiveKeys, empty_keys, write


class RollingCache(NamedTuple):
    """The last W tokens of one layer, in a ring.

    keys       [B,Hkv,D,W] float32, rotated at their own positions
    values     [B,Hkv,W,D] float32
    mask       [B,W] bool; False for padding and for slots never used
    positions  [B,W] int32
    oldest     int32, the slot that the next token takes
    """

    keys: Array
    values: Array
    mask: Array
    positions: Array
    oldest: Array

    @property
    def window(self) -> int:
        """W, slots."""
        return self.mask.shape[1]

    def append(self, new: LiveKeys) -> tuple[LiveKeys, RollingCache]:
        """The live keys that a call's tokens may see, and a new cache with the last W of all. Clause SLIDING-1.

        One token replaces the oldest one, which has just left its window; more of them stand behind the ring, put in
        order, and the window's mask hides what is too old.
        """
        ring = LiveKeys(self.keys, self.values, self.mask, self.positions)
        if new.mask.shape[1] == 1:
            seen = write(ring, new, self.oldest)
            return seen, RollingCache(*seen, oldest=(self.oldest + 1) % self.window)
        seen = LiveKeys(*map(self._put_behind, ring, new, SLOT_AXES))
        latest = LiveKeys(*map(self._last, seen, SLOT_AXES))
        return seen, RollingCache(*latest, oldest=jnp.zeros((), jnp.int32))

    def _last(self, slots: Array, axis: int) -> Array:
        return lax.slice_in_dim(slots, -self.window, None, axis=axis)

    def _put_behind(self, ring: Array, tokens: Array, axis: int) -> Array:
        return jnp.concatenate([jnp.roll(ring, -self.oldest, axis), tokens], axis)


def empty_ring(batch: int, kv_heads: int, head_dim: int, window: int, dtype: np.dtype[Any]) -> RollingCache:
    """A ring with nothing in it."""
    return RollingCache(*empty_keys(batch, kv_heads, head_dim, window, dtype), oldest=jnp.asarray(np.int32(0)))
