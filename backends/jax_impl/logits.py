"""Logits of many tokens: taken in pieces, since a vocabulary is wide."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

LOGITS_AT_ONCE = 1 << 25
"""Logits are taken in pieces of about this many (128 MB in float32)."""


def rows_at_once(vocab_size: int) -> int:
    """Tokens whose logits make a piece."""
    return max(1, LOGITS_AT_ONCE // vocab_size)


def pieces(rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of `rows` tokens whose logits fit in memory; all but the last one of the same length."""
    step = rows_at_once(vocab_size)
    return (slice(start, start + step) for start in range(0, rows, step))


def filled(rows: np.ndarray) -> np.ndarray:
    """Rows, filled up with zeros to the next power of two: few shapes, few compiled functions."""
    missing = (1 << (len(rows) - 1).bit_length()) - len(rows)
    return np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])
