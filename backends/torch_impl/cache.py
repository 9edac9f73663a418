"""The live cache of one layer: rotated keys, values, and who is real. Immutable (clause LIVE-4).

It grows in place all the same: behind the tokens that it shows are free slots, and who continues it first writes there.
What a cache shows is never written again.
"""

from __future__ import annotations

from threading import Lock
from typing import NamedTuple

import numpy as np
import torch

SMALLEST = 16
SLOT_AXES = (2, 2, 1, 1)
"""Where the slots, one for each token, are in k, v, mask and positions."""


class LiveCache(NamedTuple):
    """k (rotated at t), v [B,Hkv,L,D]; mask bool [B,L]; positions int [B,L]. Values of padding tokens are 0.

    room       whose first L slots these are, if there may be free ones
    """

    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    room: Room | None = None

    def append(self, other: LiveCache) -> LiveCache:
        """A new cache with the tokens of `other` behind those of this one.

        Nothing is written in place where gradients are recorded, since autograd keeps what it has read, nor in compiled
        code, which is traced once for caches with room and without.
        """
        start, end = self.mask.shape[1], self.mask.shape[1] + other.mask.shape[1]
        in_place = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if in_place and self.room is not None and self.room.take(start, end):
            return self.room.write(other, start, end)
        spare = free_slots(self, bucket(end) - end if in_place else 0)
        slots = LiveCache(
            torch.cat((self.k, other.k, spare.k), dim=2),
            torch.cat((self.v, other.v, spare.v), dim=2),
            torch.cat((self.mask, other.mask, spare.mask), dim=1),
            torch.cat((self.positions, other.positions, spare.positions), dim=1),
        )
        return slots.crop(end)._replace(room=Room(slots, end) if in_place else None)

    def reorder(self, rows: np.ndarray) -> LiveCache:
        """A new cache whose row i is row rows[i] of this one."""
        index = torch.tensor(rows)
        k, v, mask, positions = (part.index_select(0, index) for part in self[:4])
        return LiveCache(k, v, mask, positions)

    def crop(self, length: int) -> LiveCache:
        """A new cache with the first `length` tokens, padding included."""
        return self._replace(
            k=self.k[:, :, :length],
            v=self.v[:, :, :length],
            mask=self.mask[:, :length],
            positions=self.positions[:, :length],
        )

    def contents(self) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
        """KV heads and head_dim, mask and positions: what `check_own_cache` asks for."""
        return (self.k.shape[1], self.k.shape[3]), self.mask.cpu().numpy(), self.positions.cpu().numpy()


class Room:
    """The slots that caches share of which each continues another, and how many of them some cache shows."""

    _taking = Lock()

    def __init__(self, slots: LiveCache, taken: int) -> None:
        self.slots = slots
        self.taken = taken

    def take(self, start: int, end: int) -> bool:
        """Whether the slots from start to end are free and the caller's: asked once, since they are then taken."""
        fixed = self.slots.k.is_inference() and not torch.is_inference_mode_enabled()
        with self._taking:
            free = not fixed and self.taken == start and end <= self.slots.mask.shape[1]
            self.taken = end if free else self.taken
            return free

    def write(self, new: LiveCache, start: int, end: int) -> LiveCache:
        """The cache that ends with the new tokens, which stand in slots taken before."""
        for slots, tokens, axis in zip(self.slots[:4], new[:4], SLOT_AXES, strict=True):
            slots.narrow(axis, start, end - start).copy_(tokens)
        return self.slots.crop(end)._replace(room=self)


def bucket(length: int) -> int:
    """The slots for `length` tokens: the next power of two, at least 16."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def free_slots(cache: LiveCache, count: int) -> LiveCache:
    """So many slots for a cache; they hold anything."""
    rows, kv_heads, _, head_dim = cache.k.shape
    keys, tokens = (rows, kv_heads, count, head_dim), (rows, count)
    k, v = cache.k.new_empty(keys), cache.v.new_empty(keys)
    return LiveCache(k, v, cache.mask.new_empty(tokens), cache.positions.new_empty(tokens))


def live_tokens(k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> LiveCache:
    """The cache of the tokens of one call: k (rotated), v [B,T,Hkv,D]; mask, positions [B,T].

    Padding may hold anything, also what overflows in a projection, and 0 · inf is NaN: its values become 0.
    """
    real = torch.where(mask[:, :, None, None], v, 0.0)
    return LiveCache(k.transpose(1, 2), real.transpose(1, 2), mask, positions)
