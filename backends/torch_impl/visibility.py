"""Which live key a query sees (clauses LIVE, SLIDING and MASKED). True means seen."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lyra.spec.array_types import Bool, Int
from lyra.spec.attention import AttentionSpec


class LiveRule(NamedTuple):
    """What each query head sees of the live tokens, bool [Hkv,R] each.

    earlier  the tokens before its own
    own      its own token
    """

    earlier: Bool[torch.Tensor, "Hkv R"]
    own: Bool[torch.Tensor, "Hkv R"]


def live_rule(spec: AttentionSpec, *, device: torch.device | None = None) -> LiveRule | None:
    """The rule of the spec's live mode; None where every head is causal. Clause LIVE."""
    sees = spec.static.sees
    if not spec.lyra_q_heads or (sees.earlier and sees.own):
        return None
    vanilla = torch.ones(spec.num_attention_heads, dtype=torch.bool, device=device)
    vanilla[list(spec.lyra_q_heads)] = False
    vanilla = vanilla.view(spec.num_key_value_heads, -1)
    return LiveRule(earlier=vanilla | sees.earlier, own=vanilla | sees.own)


def visible_keys(
    query_positions: Int[torch.Tensor, "B T"],
    key_positions: Int[torch.Tensor, "B L"],
    key_mask: Bool[torch.Tensor, "B L"],
    window: int | None,
    rule: LiveRule | None,
) -> Bool[torch.Tensor, "B heads R T L"]:
    """Which live keys a query sees: bool [B,1,1,T,L], or [B,Hkv,R,T,L] under a rule that differs between heads.

    query_positions [B,T], key_positions and key_mask [B,L]. A key is seen if it is real, not later than the query
    (clause LIVE-1) and inside the window (SLIDING-1). Positions strictly increase over the real tokens of a row, so
    equal positions mean the query's own token.
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = (distance >= 0) & key_mask[:, None, :]
    if window is not None:
        visible &= distance < window
    return by_rule(visible, None if rule is None else distance == 0, rule)


def by_rule(
    visible: Bool[torch.Tensor, "B T L"], own: Bool[torch.Tensor, "... T L"] | None, rule: LiveRule | None
) -> Bool[torch.Tensor, "B heads R T L"]:
    """What each head sees of keys [B,T,L] that a causal head sees, `own` bool [B,T,L] or [T,L] being the query's own.

    bool [B,1,1,T,L], or [B,Hkv,R,T,L] under a rule. Clause LIVE.
    """
    everyone = visible[:, None, None]
    if rule is None or own is None:
        return everyone
    own = own[..., None, None, :, :]
    earlier_heads, own_heads = (part[:, :, None, None] for part in rule)
    return everyone & ((earlier_heads & ~own) | (own_heads & own))
