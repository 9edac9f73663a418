"""Which live key a query sees (clauses LIVE, SLIDING, MASKED). True means seen.

In a layer by positions, in a model of Hugging Face's by the slots of its cache and its mask.
"""

from __future__ import annotations

import torch

from lyra.spec.attention import Live
from lyra.spec.errors import InputError


def causal(
    query_positions: torch.Tensor,
    query_mask: torch.Tensor,
    key_positions: torch.Tensor,
    key_mask: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """What a vanilla head sees: real keys at most at the query's position and, with a window, less than it behind.

    query_positions, query_mask [B,T]; key_positions, key_mask [B,L]; result bool [B,T,L]. A padding query sees
    nothing, so that its head is 0 whatever it holds (clause MASKED-4). Clauses LIVE-1, LIVE-5, SLIDING-1.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    seen = (distance >= 0) & key_mask[:, None, :] & query_mask[:, :, None]
    return seen if window is None else seen & (distance < window)


def own(
    query_positions: torch.Tensor, query_mask: torch.Tensor, key_positions: torch.Tensor, key_mask: torch.Tensor
) -> torch.Tensor:
    """Every real query sees the real key at its own position and no other; bool [B,T,L]. Clause LIVE-2."""
    same = query_positions[:, :, None] == key_positions[:, None, :]
    return same & key_mask[:, None, :] & query_mask[:, :, None]


def by_head(causal: torch.Tensor, own: torch.Tensor | None, lyra: torch.Tensor, live: Live) -> torch.Tensor:
    """Visibility of live keys per head, broadcastable to [B,Hkv,R,T,L].

    causal and own bool [B,T,L], own being read in mode "self" only; lyra bool [Hkv,R]. Clause LIVE.
    """
    everyone = causal[:, None, None]
    if live == "causal":
        return everyone
    to_lyra = lyra[:, :, None, None]
    return torch.where(to_lyra, own[:, None, None], everyone) if own is not None else everyone & ~to_lyra


def visible_slots(
    live: Live,
    lyra: torch.Tensor,
    mask: torch.Tensor | None,
    tokens: int,
    keys: int,
    offset: int | torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """Which slot of a model's cache a query sees, bool, broadcastable to [B,Hkv,R,T,L]. Clause LIVE.

    lyra bool [Hkv,R]; the model's mask hides padding, and without one every key is real; the call's `tokens` stand in
    the slots from `offset` on, and slots in causal order.
    """
    query_slots = torch.arange(tokens, device=device)[:, None] + offset
    key_slots = torch.arange(keys, device=device)[None, :]
    earlier = (key_slots <= query_slots)[None] if mask is None else live_keys(mask)[..., :keys]
    same = (key_slots == query_slots)[None] if live == "self" else None
    return by_head(earlier, same, lyra, live)


def live_keys(mask: torch.Tensor) -> torch.Tensor:
    """The visible keys of a model's mask [B,1,T,L], boolean or additive (0 where seen), as bool [B,T,L]."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[1] != 1:
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}; expected [batch, 1, queries, keys]")
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
