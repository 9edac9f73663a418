"""transformers' Cache as the live cache of a layer. PyTorch alone: in JAX a model's cache is Lyra's own.

A model draws its masks itself, by slots of its cache. So keys that stand in such slots know from that mask which of
them a query sees, not from positions.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from transformers.cache_utils import Cache

from lyra.spec.errors import InputError

from .cache import LiveKeys
from .visibility import LiveRule, by_rule


class SlotKeys(NamedTuple):
    """Live keys in the slots of a model's cache: keys (rotated), values [B,Hkv,L,D].

    mask     the model's, [B,1,T,L], boolean or additive; None where every key is real and slots are in causal order
    tokens   T, how many tokens the call has
    offset   the slot of its first one
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    tokens: int
    offset: int | torch.Tensor

    def visible(self, positions: None, window: int | None, rule: LiveRule | None) -> torch.Tensor | None:
        """Which slots the call's queries see, bool, broadcastable to [B,Hkv,R,T,L]; None where it is one that sees all.

        The model's mask says what a window hides. Raises InputError for a mask of another shape. Clauses LIVE, MASKED.
        """
        slots = self.keys.shape[2]
        alone = self.mask is None and self.tokens == 1 and isinstance(self.offset, int) and slots == self.offset + 1
        if rule is None and alone:
            return None
        return visible_slots(self.mask, self.tokens, slots, self.offset, rule, self.keys.device)


class ModelCache:
    """A layer's place in a model's cache, or in none. After `append`, `live` is what the call attends to."""

    live: SlotKeys | None = None

    def __init__(self, cache: Cache | None, place: int, mask: torch.Tensor | None) -> None:
        self.cache, self.place, self.mask = cache, place, mask

    def append(self, new: LiveKeys) -> tuple[SlotKeys, Self]:
        """All keys that the cache gives for the layer, the new ones among them; it keeps them itself."""
        keys, values, offset = new.keys, new.values, 0
        tokens = keys.shape[2]
        if self.cache is not None:
            keys, values = self.update(self.cache, keys, values)
            offset = self.cache.get_seq_length(self.place) - tokens
        self.live = SlotKeys(keys, values, self.mask, tokens, offset)
        return self.live, self

    def update(self, cache: Cache, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values [B,Hkv,T,D] into the cache; all that it then holds."""
        return cache.update(keys, values, self.place)


def visible_slots(
    mask: torch.Tensor | None,
    tokens: int,
    slots: int,
    offset: int | torch.Tensor,
    rule: LiveRule | None,
    device: torch.device,
) -> torch.Tensor:
    """Which slot of a model's cache a query sees, bool, broadcastable to [B,Hkv,R,T,L]. Clause LIVE.

    The model's mask hides padding and free slots, and without one every slot up to a query's own is seen; the call's
    `tokens` stand in the slots from `offset` on.
    """
    own: torch.Tensor | None = None
    if mask is None or rule is not None:
        queries = torch.arange(tokens, device=device)[:, None] + offset
        keys = torch.arange(slots, device=device)[None, :]
        own = keys == queries
    seen = (keys <= queries)[None] if mask is None else seen_by_mask(mask)[..., :slots]
    return by_rule(seen, own, rule)


def seen_by_mask(mask: torch.Tensor) -> torch.Tensor:
    """The visible keys of a model's mask [B,1,T,L], boolean or additive (0 where seen), as bool [B,T,L]."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}; expected [batch, 1, queries, keys]")
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
