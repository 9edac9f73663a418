"""Rounding to bfloat16, in NumPy: a float32 with 8 bits of exponent and 8 of significand, 7 of them stored."""

from __future__ import annotations

import numpy as np

DIGITS = 8
"""Bits of a bfloat16's significand."""


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """The bfloat16 nearest to each float32 value, ties to even, as uint16 little-endian."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bfloat16 nearest to each value, ties to even, as float32 of the same shape."""
    return (bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32).reshape(np.shape(values))


def beyond(exact: np.ndarray, got: np.ndarray) -> np.ndarray:
    """How far each exact value lies outside the numbers that round to `got`, 0 within; infinite for no bfloat16.

    float64, of the shape of both. At a power of two the numbers on the side of 0 stand half as far apart.
    """
    exact, got = np.asarray(exact, dtype=np.float64), np.asarray(got)
    significand, exponent = np.frexp(np.abs(got.astype(np.float64)))
    half = np.ldexp(1.0, exponent - DIGITS - 1)
    half = np.where((significand == 0.5) & (np.abs(exact) < np.abs(got)), half / 2, half)
    half = np.where(got == 0, 0.0, half)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.isfinite(got) & (got == to_bfloat16(got))
    return np.where(stored, np.maximum(np.abs(exact - np.where(stored, got, 0.0)) - half, 0.0), np.inf)
