"""The live cache of one layer: rotated keys, values, and who is real. Immutable (clause LIVE-4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch


class LiveCache(NamedTuple):
    """k (rotated at t), v [B,Hkv,L,D]; mask bool [B,L]; positions int [B,L]. Values of padding tokens are 0."""

    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    def append(self, other: LiveCache) -> LiveCache:
        """A new cache with the tokens of `other` behind those of this one."""
        return LiveCache(
            torch.cat((self.k, other.k), dim=2),
            torch.cat((self.v, other.v), dim=2),
            torch.cat((self.mask, other.mask), dim=1),
            torch.cat((self.positions, other.positions), dim=1),
        )

    def reorder(self, rows: Sequence[int]) -> LiveCache:
        """A new cache whose row i is row rows[i] of this one."""
        index = torch.tensor(rows, dtype=torch.long)
        return LiveCache(*(part.index_select(0, index) for part in self))

    def crop(self, length: int) -> LiveCache:
        """A new cache with the first `length` tokens, padding included."""
        return LiveCache(
            self.k[:, :, :length], self.v[:, :, :length], self.mask[:, :length], self.positions[:, :length]
        )

    def contents(self) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
        """KV heads and head_dim, mask and positions: what `check_own_cache` asks for."""
        return (self.k.shape[1], self.k.shape[3]), self.mask.cpu().numpy(), self.positions.cpu().numpy()


def live_tokens(k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> LiveCache:
    """The cache of the tokens of one call: k (rotated), v [B,T,Hkv,D]; mask, positions [B,T].

    Padding may hold anything, also what overflows in a projection, and 0 · inf is NaN: its values become 0.
    """
    real = torch.where(mask[:, :, None, None], v, 0.0)
    return LiveCache(k.transpose(1, 2), real.transpose(1, 2), mask, positions)
