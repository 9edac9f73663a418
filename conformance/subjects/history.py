"""What a subject remembers of the tokens that have gone into a model's cache, whichever framework the cache is of."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from lyra.spec.inputs import CallInputs


class Past(Protocol):
    """A cache that knows the mask and the positions [B,L] of its tokens."""

    @property
    def mask(self) -> np.ndarray: ...

    @property
    def positions(self) -> np.ndarray: ...


def so_far(past: Past | None, inputs: CallInputs) -> tuple[np.ndarray, np.ndarray]:
    """Mask and positions [B,L+T] of the tokens of a cache, if there is one, and of a call behind them."""
    if past is None:
        return inputs.mask, inputs.positions
    mask = np.concatenate([past.mask, inputs.mask], axis=1)
    return mask, np.concatenate([past.positions, inputs.positions], axis=1)
