"""The one tolerance: how many σ apart two values may be (SPEC.md, TOLERANCE)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lyra.spec.bfloat16 import beyond
from lyra.spec.uncertain import K, Uncertain

__all__ = ["K_PAIR", "MODEL", "Distance", "K", "distance", "model_distance", "stored_distance"]

K_PAIR = K * 2**0.5


class Distance(NamedTuple):
    """The largest |Δ|/σ between two arrays, where it is, and what stands there."""

    ratio: float
    place: tuple[int, ...]
    got: float
    expected: float
    sigma: float

    def describe(self, name: str, limit: float) -> str:
        """One line for a failure message."""
        place = ", ".join(map(str, self.place))
        return (
            f"|Δ|/σ = {self.ratio:.3g} at {name}[{place}] (limit {limit:.3g}): "
            f"got {self.got:.9g}, expected {self.expected:.9g}, σ {self.sigma:.3g}"
        )


def distance(got: np.ndarray, expected: Uncertain, where: np.ndarray | None = None) -> Distance:
    """How far `got` is from the oracle's value, in σ, over the rows that `where` [B,T] shows.

    NaN, infinity or a difference where σ is 0 counts as infinitely far. Raises ValueError on another shape.
    """
    if got.shape != expected.value.shape:
        raise ValueError(f"got shape {got.shape}, expected {expected.value.shape}")
    return _largest(np.abs(got.astype(np.float64) - expected.value), got, expected, where)


def stored_distance(got: np.ndarray, expected: Uncertain, where: np.ndarray | None = None) -> Distance:
    """How far the oracle's value is, in σ, from the numbers that round to the bfloat16 `got` (TOLERANCE-4).

    A value that is no bfloat16 is infinitely far. Raises ValueError on another shape.
    """
    if got.shape != expected.value.shape:
        raise ValueError(f"got shape {got.shape}, expected {expected.value.shape}")
    return _largest(beyond(expected.value, got), got, expected, where)


def _largest(delta: np.ndarray, got: np.ndarray, expected: Uncertain, where: np.ndarray | None) -> Distance:
    if got.size == 0 or (where is not None and not where.any()):
        return Distance(0.0, (), 0.0, 0.0, 0.0)
    sigma = expected.sigma
    ratio = np.divide(delta, sigma, out=np.where(delta > 0, np.inf, 0.0), where=sigma > 0)
    ratio = np.where(np.isfinite(got), ratio, np.inf)
    if where is not None:
        ratio[~where] = -1.0
    index = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    return Distance(
        float(ratio[index]),
        tuple(int(i) for i in index),
        float(got[index]),
        float(expected.value[index]),
        float(sigma[index]),
    )


MODEL = 1e-4
"""Whole models have no σ: two float32 runs of a model agree where |Δ| ≤ MODEL · max|value|."""


def model_distance(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest |Δ| relative to the largest |wanted|; infinite for another shape, NaN or infinity."""
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(got.astype(np.float64) - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-30))
