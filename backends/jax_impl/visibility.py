"""Which live key a query sees (clauses LIVE, SLIDING and MASKED). True means seen."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax import Array

from lyra.spec.array_types import Bool, Int
from lyra.spec.attention import AttentionSpec

from .dtype import Given, constant


class LiveRule(NamedTuple):
    """What each query head sees of the live tokens: [Hkv,R] bool each.

    earlier  the tokens before its own
    own      its own token
    """

    earlier: Bool[Given, "Hkv R"]
    own: Bool[Given, "Hkv R"]


def live_rule(spec: AttentionSpec) -> LiveRule | None:
    """The rule of the spec's live mode; None where every head is causal. Clause LIVE."""
    sees = spec.static.sees
    if not spec.lyra_q_heads or (sees.earlier and sees.own):
        return None
    heads = np.ones(spec.num_attention_heads, dtype=bool)
    heads[list(spec.lyra_q_heads)] = False
    vanilla = heads.reshape(spec.num_key_value_heads, -1)
    return LiveRule(earlier=constant(vanilla | sees.earlier, bool), own=constant(vanilla | sees.own, bool))


def visible_keys(
    query_positions: Int[Given, "B T"],
    key_positions: Int[Given, "B L"],
    key_mask: Bool[Given, "B L"],
    window: Int[Given, ""] | None,
    rule: LiveRule | None,
) -> Bool[Array, "B heads R T L"]:
    """Which live keys a query sees: bool [B,1,1,T,L], or [B,Hkv,R,T,L] under a rule that differs between heads.

    query_positions [B,T], key_positions and key_mask [B,L]. A key is seen if it is real, not later than the query
    (clause LIVE-1) and inside the window (SLIDING-1). Positions strictly increase over the real tokens of a row, so
    equal positions mean the query's own token.
    """
    query, key = query_positions[:, None, None, :, None], key_positions[:, None, None, None, :]
    visible = (key <= query) & key_mask[:, None, None, None, :]
    if window is not None:
        visible &= key > query - window
    if rule is None:
        return visible
    earlier, own = (heads[:, :, None, None] for heads in rule)
    return visible & ((earlier & (key < query)) | (own & (key == query)))
