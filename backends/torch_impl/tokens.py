"""Token ids and their mask on the way into a model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lyra.spec.arguments import check_ids, check_mask


class Tokens(NamedTuple):
    """ids int [B,T]; mask int [B,T] with 1 for real tokens, or None where there is no padding."""

    ids: torch.Tensor
    mask: torch.Tensor | None


class Packed(NamedTuple):
    """Tokens whose rows have their real ones side by side: ids int [B,T], mask int [B,T] or None.

    source int [B,T]: the column that a token of the caller's ids now stands in; None where every one stands in its own.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    source: torch.Tensor | None


def check_tokens(ids: np.ndarray, mask: np.ndarray | None, vocab_size: int, device: torch.device) -> Tokens:
    """Check ids [B,T] and mask [B,T] (bool, False = padding) and bring them to the device. Raises InputError."""
    ids = check_ids(ids, vocab_size)
    mask = check_mask(mask, ids.shape)
    tensor = torch.tensor(ids, dtype=torch.long, device=device)
    return Tokens(tensor, None if mask.all() else torch.tensor(mask, dtype=torch.long, device=device))


def token_positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only, int [B,T]; padding gets any position in range. Clause POSITION-4."""
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


def pack_left(tokens: Tokens) -> Packed:
    """Move the real tokens of every row to the right end, in their order, if a row has padding between them.

    Hugging Face counts a window in slots of its cache, where padding has a place too. Clause POSITION-4.
    """
    ids, mask = tokens
    if mask is None or not bool(((mask.diff(dim=1) == 1).sum(dim=1) + mask[:, 0] > 1).any()):
        return Packed(ids, mask, None)
    order = mask.argsort(dim=1, stable=True)
    return Packed(ids.gather(1, order), mask.gather(1, order), order.argsort(dim=1))
