"""Token ids and their mask on the way into a model."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from lyra.spec.errors import InputError


class Tokens(NamedTuple):
    """ids int [B,T]; mask int [B,T] with 1 for real tokens, or None where there is no padding."""

    ids: torch.Tensor
    mask: torch.Tensor | None


def check_tokens(ids: np.ndarray, mask: np.ndarray | None, vocab_size: int, device: torch.device) -> Tokens:
    """Check ids [B,T] and mask [B,T] (bool, False = padding) and bring them to the device. Raises InputError."""
    ids = np.asarray(ids)
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"ids has shape {ids.shape} and dtype {ids.dtype}; expected integers [batch, tokens]")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise InputError(f"ids range from {ids.min()} to {ids.max()}; the vocabulary has ids 0 to {vocab_size - 1}")
    tensor = torch.tensor(ids, dtype=torch.long, device=device)
    if mask is None:
        return Tokens(tensor, None)
    mask = np.asarray(mask)
    if mask.shape != ids.shape or mask.dtype != np.bool_:
        raise InputError(f"mask has shape {mask.shape} and dtype {mask.dtype}; expected bool {ids.shape}")
    return Tokens(tensor, None if mask.all() else torch.tensor(mask, dtype=torch.long, device=device))


def token_positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only, int [B,T]; padding gets any position in range. Clause POSITION-4."""
    return (mask.cumsum(dim=1) - 1).clamp_min(0)
