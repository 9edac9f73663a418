"""How an injected block gets at live keys through transformers' Cache: those of its layer, or some of its own.

A context never goes into a cache. Live keys do: beam search, crop and reset then treat a block's keys as its layer's.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from lyra.spec.errors import InputError

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

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)


def keep_live(
    cache: Cache, slot: int, layer_idx: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a block's own k (rotated at t), v [B,Hkv,T,D] into the cache, behind the model's layers; all it then holds.

    `slot` is the block's place there, `layer_idx` its decoder layer, which has just put its own keys in. Raises
    InputError for a kind of cache that is not known, and for a cache begun without the block.
    """
    while len(cache.layers) <= slot:
        cache.layers.append(_alike(cache.layers[layer_idx]))
    before, seen = cache.layers[slot].get_seq_length(), cache.layers[layer_idx].get_seq_length()
    if isinstance(before, int) and isinstance(seen, int) and before != seen - k.shape[2]:
        raise InputError(
            f"layer {layer_idx}: the cache holds {seen - k.shape[2]} earlier tokens of the layer and {before} of the "
            f"block that is injected into it; begin a new cache after attaching"
        )
    return cache.update(k, v, slot)


def _alike(layer: Any) -> Any:
    kind = type(layer)
    if kind not in LAYER_KINDS:
        raise InputError(
            f"a block that keeps live keys of its own needs a DynamicCache or a StaticCache, and this cache has a "
            f"{kind.__name__}; take one of these or live='none'"
        )
    return kind(**{name: getattr(layer, name) for name in LAYER_KINDS[kind]})
