"""Float64 values that carry the variance float32 rounding would give them (SPEC.md, TOLERANCE).

Rounding errors count as independent and propagate to first order, in root-sum-square. Each function is one row of the
table in SPEC.md, section TOLERANCE.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

U = 2.0**-24
"""Unit roundoff of float32."""

U_BFLOAT16 = 2.0**-9
"""Unit roundoff of bfloat16."""


class Uncertain(NamedTuple):
    """A float64 value and the variance of its float32 rounding error, of the same shape."""

    value: np.ndarray
    variance: np.ndarray

    @property
    def sigma(self) -> np.ndarray:
        """The standard deviation of the rounding error."""
        return np.sqrt(self.variance)

    def pick(self, index: Any) -> Uncertain:
        """The same selection of value and variance."""
        return Uncertain(self.value[index], self.variance[index])


def exact(value: np.ndarray) -> Uncertain:
    """A value that enters without error."""
    value = np.asarray(value, dtype=np.float64)
    return Uncertain(value, np.zeros_like(value))


def stored(y: Uncertain, unit: float) -> Uncertain:
    """What storing a value in a narrower type adds; `unit` is that type's unit roundoff, 0 for float32."""
    return Uncertain(y.value, y.variance + (unit * y.value) ** 2) if unit else y


def sum_error(n: int) -> float:
    """c(n): relative error of a sum of n products, whatever order it is summed in."""
    return float(U * (np.sqrt(n) / 4 + 2))


def linear(x: Uncertain, weight: np.ndarray, bias: np.ndarray | None) -> Uncertain:
    """x [..., n] times weight [m, n] transposed, plus bias [m]."""
    weight = np.asarray(weight, dtype=np.float64)
    value = x.value @ weight.T
    variance = (x.variance + sum_error(weight.shape[1]) ** 2 * x.value**2) @ (weight**2).T
    if bias is not None:
        value = value + np.asarray(bias, dtype=np.float64)
        variance = variance + (U * value) ** 2
    return Uncertain(value, variance)


def rms_norm(z: Uncertain, weight: np.ndarray, eps: float) -> Uncertain:
    """RMSNorm over the last axis with weight 1 + w."""
    size = z.value.shape[-1]
    gain = 1.0 + np.asarray(weight, dtype=np.float64)
    mean_square = (z.value**2).mean(axis=-1, keepdims=True) + eps
    y = z.value / np.sqrt(mean_square) * gain
    rho = np.sqrt((z.value**2 * z.variance).sum(axis=-1, keepdims=True)) / (size * mean_square)
    variance = z.variance * gain**2 / mean_square + y**2 * ((rho + sum_error(size) / 2) ** 2 + (4 * U) ** 2)
    return Uncertain(y, variance)


def rotate(y: Uncertain, angle: np.ndarray) -> Uncertain:
    """Turn pairs (i, i + D/2) of the last axis by angle [..., D/2] radians."""
    half = y.value.shape[-1] // 2
    first, second = y.value[..., :half], y.value[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    value = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turning = (first**2 + second**2) * (2 * U * (np.abs(angle) + 1)) ** 2
    pair = y.variance[..., :half] + y.variance[..., half:] + turning
    return Uncertain(value, np.concatenate([pair, pair], axis=-1))


def scores(q: Uncertain, k: Uncertain, scale: float, softcap: float | None, visible: np.ndarray) -> Uncertain:
    """Scaled, softcapped scores of q [..., T, D] and k [..., L, D]; hidden ones are -inf with variance 0."""
    size = q.value.shape[-1]
    squares = np.swapaxes(k.value**2, -1, -2)
    raw = scale * (q.value @ np.swapaxes(k.value, -1, -2))
    variance = (q.variance + sum_error(size) ** 2 * q.value**2) @ squares
    variance = scale**2 * (variance + q.value**2 @ np.swapaxes(k.variance, -1, -2))
    value, slope = raw, 1.0
    if softcap is not None:
        tanh = np.tanh(raw / softcap)
        value, slope = softcap * tanh, 1.0 - tanh**2
    top = np.max(np.where(visible, value, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
    below = np.where(visible, np.abs(value - np.where(np.isfinite(top), top, 0.0)), 0.0)
    rounding = U * (below + 3 * np.abs(value if softcap is None else slope * raw) + 4)
    variance = variance * slope**2 + rounding**2
    if softcap is not None:
        variance = variance + (4 * U * value) ** 2
    return Uncertain(np.where(visible, value, -np.inf), np.where(visible, variance, 0.0))


def softmax_average(s: Uncertain, v: Uncertain) -> Uncertain:
    """Softmax of s [..., T, L] over L, averaging v [..., L, D]; a row with nothing visible gives exactly 0."""
    top = s.value.max(axis=-1, keepdims=True, initial=-np.inf)
    weight = np.exp(s.value - np.where(np.isfinite(top), top, 0.0))
    total = weight.sum(axis=-1, keepdims=True)
    p = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    o = p @ v.value
    pull = p**2 * s.variance  # how far each score's error moves the average: Σ p²σ²(v − o)², multiplied out
    spread = pull @ v.value**2 - 2 * o * (pull @ v.value) + o**2 * pull.sum(axis=-1, keepdims=True)
    summing = p**2 @ (sum_error(s.value.shape[-1]) ** 2 * v.value**2 + v.variance)
    return Uncertain(o, np.maximum(spread, 0.0) + summing + (2 * U * o) ** 2)
