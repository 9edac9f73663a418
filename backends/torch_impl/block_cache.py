"""How an injected block gets at live keys through transformers' Cache: those of its layer, or some of its own.

A context never goes into a cache. Live keys do: beam search, crop and reset then treat a block's keys as its layer's.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from lyra.spec.errors import InputError

from .hf_cache import ModelCache, SlotKeys

LAYER_KINDS = {DynamicLayer: (), StaticLayer: ("max_cache_len",)}
"""Kinds of cache layers that a block's own keys can be kept in, with what making another one takes."""


class WatchedCache:
    """Stands between a layer's own attention and the model's cache, if there is one, and keeps what is attended to.

    `k` (rotated at t), `v` [B,Hkv,L,D]: what the last `update` returned, whatever kind of cache it comes from; a
    sliding one forgets some of it afterwards.
    """

    def __init__(self, cache: Cache | None) -> None:
        self.cache = cache
        self.k: torch.Tensor | None = None
        self.v: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `Cache.update` of the model's cache returns; the call's own keys and values without one."""
        if self.cache is not None:
            key_states, value_states = self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)
        self.k, self.v = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens the layer has seen, those of this call included."""
        if self.cache is not None:
            return self.cache.get_seq_length(layer_idx)
        return 0 if self.k is None else self.k.shape[-2]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many keys the next `update` with so many tokens returns, and the position of the first."""
        return (query_length, 0) if self.cache is None else self.cache.get_mask_sizes(query_length, layer_idx)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


class BlockCache(ModelCache):
    """A block's own place in a model's cache, behind those of the model's layers."""

    def __init__(self, cache: Cache | None, slot: int | None, layer_idx: int, mask: torch.Tensor | None) -> None:
        """`slot` is the place, `layer_idx` that of its decoder layer. Raises InputError for a cache without a slot."""
        if cache is not None and slot is None:
            raise InputError(f"layer {layer_idx}: a block that sees live tokens needs a slot in the cache")
        super().__init__(cache, -1 if slot is None else slot, mask)
        self.layer_idx = layer_idx

    def update(self, cache: Cache, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As in the parent; the block's decoder layer has just put its own keys in.

        Raises InputError for a kind of cache that is not known, and for a cache begun without the block.
        """
        while len(cache.layers) <= self.place:
            cache.layers.append(_alike(cache.layers[self.layer_idx]))
        before, seen = (cache.layers[place].get_seq_length() for place in (self.place, self.layer_idx))
        tokens = keys.shape[2]
        if isinstance(before, int) and isinstance(seen, int) and before != seen - tokens:
            raise InputError(
                f"layer {self.layer_idx}: the cache holds {seen - tokens} earlier tokens of the layer and {before} of "
                f"the block that is injected into it; begin a new cache after attaching"
            )
        return cache.update(keys, values, self.place)


class SharedCache:
    """What a layer's own attention attended to in the call, for a block that makes no keys. Clause SEQUENTIAL-6."""

    def __init__(self, watched: object, layer_idx: int, mask: torch.Tensor | None, tokens: int) -> None:
        """Raises InputError for another cache than the WatchedCache that the layer's own attention was given."""
        if not isinstance(watched, WatchedCache) or watched.k is None or watched.v is None:
            raise InputError(
                "a block with source='own' needs the WatchedCache that its layer's own attention was given"
            )
        self.live = SlotKeys(watched.k, watched.v, mask, tokens, watched.get_seq_length(layer_idx) - tokens)

    def append(self, new: None) -> tuple[SlotKeys, Self]:
        """The keys that are there already: a block that shares them adds none."""
        return self.live, self


def _alike(layer: Any) -> Any:
    kind = type(layer)
    if kind not in LAYER_KINDS:
        raise InputError(
            f"a block that keeps live keys of its own needs a DynamicCache or a StaticCache, and this cache has a "
            f"{kind.__name__}; take one of these or live='none'"
        )
    return kind(**{name: getattr(layer, name) for name in LAYER_KINDS[kind]})
