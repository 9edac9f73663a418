"""Standard normal numbers for the arrays of cases, cut from one sheet: drawing each anew cost a fifth of a run."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

SHEET = 1 << 21
"""Numbers in the sheet; an array of more than a quarter of that is drawn anew."""


@cache
def sheet() -> np.ndarray:
    """The sheet [SHEET] float32, the same on every machine, not to be written to."""
    numbers = np.random.default_rng(20).standard_normal(SHEET, dtype=np.float32)
    numbers.flags.writeable = False
    return numbers


class RandomArrays:
    """A source of arrays for one case: its seed says where the sheet is cut, and one array follows the other."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._at = int(rng.integers(SHEET))

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal numbers of a shape, float32, the caller's to write to."""
        count = math.prod(shape)
        if count > SHEET // 4:
            return self._rng.standard_normal(shape, dtype=np.float32)
        start, self._at = self._at, (self._at + count) % SHEET
        end = start + count
        if end <= SHEET:
            return sheet()[start:end].reshape(shape).copy()
        return np.concatenate([sheet()[start:], sheet()[: end - SHEET]]).reshape(shape)
