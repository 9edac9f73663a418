"""Logits of many tokens: taken in pieces, since a vocabulary is wide."""

from __future__ import annotations

import torch
from torch import nn

LOGITS_AT_ONCE = 1 << 25
"""Logits are taken in pieces of about this many (128 MB in float32)."""


def rows_at_once(vocab_size: int) -> int:
    """Tokens whose logits make a piece."""
    return max(1, LOGITS_AT_ONCE // vocab_size)


def logits(head: nn.Module, hidden: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """hidden [...,E] through a model's head, in float32 and softcapped: [...,V]."""
    scores = head(hidden).float()
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap
