"""The live cache of one layer: rotated keys, values, and who is real. Immutable (clause LIVE-4).

It grows in place all the same: behind the tokens that it shows are free slots, and who continues it first writes there.
What a cache shows is never written again.
"""

from __future__ import annotations

from threading import Lock
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from lyra.spec.array_types import Bool, Float, Int

from .visibility import LiveRule, visible_keys

SMALLEST = 16
SLOT_AXES = (2, 2, 1, 1)
"""Where the slots, one for each token, are in each array of LiveKeys."""


class LiveKeys(NamedTuple):
    """The live keys that a call attends to: keys (rotated at t), values [B,Hkv,L,D]; mask bool, positions int [B,L]."""

    keys: Float[torch.Tensor, "B Hkv L D"]
    values: Float[torch.Tensor, "B Hkv L D"]
    mask: Bool[torch.Tensor, "B L"]
    positions: Int[torch.Tensor, "B L"]

    def visible(self, positions: torch.Tensor, window: int | None, rule: LiveRule | None) -> torch.Tensor | None:
        """Which of them queries at `positions` [B,T] see, as `visible_keys` says it. Clauses LIVE, SLIDING, MASKED."""
        return visible_keys(positions, self.positions, self.mask, window, rule)


@runtime_checkable
class Keys(Protocol):
    """What a call attends to, wherever it is kept: LiveKeys, or those in the slots of a model's cache."""

    @property
    def keys(self) -> torch.Tensor:
        """Rotated at t, [B,Hkv,L,D]."""
        ...

    @property
    def values(self) -> torch.Tensor:
        """[B,Hkv,L,D]."""
        ...

    def visible(self, positions: Any, window: int | None, rule: LiveRule | None) -> torch.Tensor | None:
        """Which keys the call's queries see, bool, broadcastable to [B,Hkv,R,T,L]; None where they see all."""
        ...


@runtime_checkable
class Cache(Protocol):
    """What a layer's keys and values go into: LiveCache, or a place in a model's cache."""

    def append(self, new: Any) -> tuple[Keys, Any]:
        """All live keys, the new ones among them, and the cache that holds them; None adds nothing."""
        ...


class LiveCache(NamedTuple):
    """keys (rotated at t), values [B,Hkv,L,D]; mask bool [B,L]; positions int [B,L].

    room       whose first L slots these are, if there may be free ones
    """

    keys: Float[torch.Tensor, "B Hkv L D"]
    values: Float[torch.Tensor, "B Hkv L D"]
    mask: Bool[torch.Tensor, "B L"]
    positions: Int[torch.Tensor, "B L"]
    room: Room | None = None

    def used(self) -> LiveKeys:
        """The live keys as they are."""
        return LiveKeys(*self[:4])

    def append(self, new: LiveKeys | None) -> tuple[LiveKeys, LiveCache]:
        """All live keys, old and new, and a new cache that holds them; with None the old ones and this cache.

        Nothing is written in place where gradients are recorded, since autograd keeps what it has read, nor in compiled
        code, which is traced once for caches with room and without.
        """
        if new is None:
            return self.used(), self
        start, end = self.mask.shape[1], self.mask.shape[1] + new.mask.shape[1]
        if start == 0 and self.room is None:
            return new, LiveCache(*new)
        in_place = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if in_place and self.room is not None and self.room.take(start, end):
            cache = self.room.write(new, start, end)
        else:
            spare = _free_slots(self, bucket(end) - end if in_place else 0)
            slots = LiveCache(
                torch.cat((self.keys, new.keys, spare.keys), dim=2),
                torch.cat((self.values, new.values, spare.values), dim=2),
                torch.cat((self.mask, new.mask, spare.mask), dim=1),
                torch.cat((self.positions, new.positions, spare.positions), dim=1),
            )
            cache = crop(slots, end)._replace(room=Room(slots, end) if in_place else None)
        return cache.used(), cache

    def contents(self) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
        """KV heads and head_dim, mask and positions: what `check_own_cache` asks for."""
        return (self.keys.shape[1], self.keys.shape[3]), self.mask.cpu().numpy(), self.positions.cpu().numpy()


class Room:
    """The slots that caches share of which each continues another, and how many of them some cache shows."""

    _taking = Lock()

    def __init__(self, slots: LiveCache, taken: int) -> None:
        self.slots = slots
        self.taken = taken

    def take(self, start: int, end: int) -> bool:
        """Whether the slots from start to end are free and the caller's: asked once, since they are then taken."""
        fixed = self.slots.keys.is_inference() and not torch.is_inference_mode_enabled()
        with self._taking:
            free = not fixed and self.taken == start and end <= self.slots.mask.shape[1]
            self.taken = end if free else self.taken
            return free

    def write(self, new: LiveKeys, start: int, end: int) -> LiveCache:
        """The cache that ends with the new tokens, which stand in slots taken before."""
        for slots, tokens, axis in zip(self.slots.used(), new, SLOT_AXES, strict=True):
            slots.narrow(axis, start, end - start).copy_(tokens)
        return crop(self.slots, end)._replace(room=self)


def live_keys(
    k: Float[torch.Tensor, "B T Hkv D"], v: Float[torch.Tensor, "B T Hkv D"], mask: Any, positions: Any
) -> LiveKeys:
    """The tokens of a call as live keys: k, v [B,T,Hkv,D], k rotated; mask and positions [B,T]."""
    return LiveKeys(k.transpose(1, 2), v.transpose(1, 2), mask, positions)


def bucket(length: int) -> int:
    """The slots for `length` tokens: the next power of two, at least 16."""
    return max(SMALLEST, 1 << (length - 1).bit_length())


def empty_cache(
    batch: int,
    kv_heads: int,
    head_dim: int,
    capacity: int = 0,
    dtype: torch.dtype = torch.float32,
    *,
    device: torch.device | None = None,
) -> LiveCache:
    """A cache with nothing in it."""
    keys = torch.empty(batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
    tokens = torch.empty(batch, capacity, dtype=torch.long, device=device)
    slots = LiveCache(keys, torch.empty_like(keys), tokens.bool(), tokens)
    return crop(slots, 0)._replace(room=Room(slots, 0)) if capacity else slots


def crop(cache: LiveCache, length: int) -> LiveCache:
    """The first `length` tokens, padding included: nothing is copied. Clause BATCH-5."""
    return cache._replace(
        keys=cache.keys[:, :, :length],
        values=cache.values[:, :, :length],
        mask=cache.mask[:, :length],
        positions=cache.positions[:, :length],
    )


def reorder(cache: LiveCache, rows: Int[np.ndarray, " rows"]) -> LiveCache:
    """The given rows of the cache, in the given order, repeats allowed. Clause BATCH-5."""
    index = torch.tensor(rows)
    keys, values, mask, positions = (part.index_select(0, index) for part in cache.used())
    return LiveCache(keys, values, mask, positions)


def _free_slots(cache: LiveCache, count: int) -> LiveKeys:
    """So many slots for a cache; they hold anything."""
    rows, kv_heads, _, head_dim = cache.keys.shape
    keys, tokens = (rows, kv_heads, count, head_dim), (rows, count)
    k, v = cache.keys.new_empty(keys), cache.values.new_empty(keys)
    return LiveKeys(k, v, cache.mask.new_empty(tokens), cache.positions.new_empty(tokens))
