"""Float64 values that carry the variance float32 rounding would give them (SPEC.md, TOLERANCE).

Rounding errors count as independent and propagate to first order, in root-sum-square. Each function is one row of the
table in SPEC.md, section TOLERANCE.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .array_types import Bool, Float, Shaped
from .bfloat16 import to_bfloat16

U = 2.0**-24
"""Unit roundoff of float32."""

BFLOAT16 = 2.0**-9
"""Standard deviation, relative to a value, of rounding it to bfloat16, whose unit roundoff is 2⁻⁸."""

K = 8.0
"""A backend passes where |Δ| ≤ K·σ at every element; two backends may differ by K·√2·σ (TOLERANCE-1).

But for the sums that `sum_error` names, the largest |Δ|/σ seen of correct code is below 6, in PyTorch, in XLA, whose
matrix products sum with one accumulator, and on the real weights of Gemma-3 270M (docs/calibration.md); theta off by
0.01% gives 14 to 110.
"""

STEEPEST = 500.0
"""The largest error of a score that is told from a larger one: exp of it still is a float64."""


class Uncertain(NamedTuple):
    """A float64 value and the variance of its float32 rounding error, of the same shape."""

    value: np.ndarray
    variance: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes of the value, and of the variance: so that a signature can name them."""
        return self.value.shape

    @property
    def dtype(self) -> np.dtype:
        """The type of the value's elements."""
        return self.value.dtype

    @property
    def sigma(self) -> np.ndarray:
        """The standard deviation of the rounding error."""
        return np.sqrt(self.variance)

    def pick(self, index: Any) -> Uncertain:
        """The same selection of value and variance."""
        return Uncertain(self.value[index], self.variance[index])


def exact(value: Shaped[np.ndarray, "*axes"]) -> Float[Uncertain, "*axes"]:
    """A value that enters without error."""
    value = np.asarray(value, dtype=np.float64)
    return Uncertain(value, np.zeros_like(value))


def stored(y: Float[Uncertain, "*axes"], dtype: str) -> Float[Uncertain, "*axes"]:
    """What storing a value between two stages adds: nothing in float32, the rounding in bfloat16 (DTYPE-1)."""
    return y if dtype == "float32" else Uncertain(y.value, y.variance + (BFLOAT16 * y.value) ** 2)


def stored_turned(y: Float[Uncertain, "*axes D"], dtype: str) -> Float[Uncertain, "*axes D"]:
    """The same for pairs (i, i + D/2) that a backend may store at another angle, as POSITION allows."""
    if dtype == "float32":
        return y
    first, second = np.split(y.value, 2, axis=-1)
    pair = BFLOAT16**2 * (first**2 + second**2)
    return Uncertain(y.value, y.variance + np.concatenate([pair, pair], axis=-1))


def rounded(y: Float[Uncertain, "*axes"]) -> Float[Uncertain, "*axes"]:
    """The bfloat16 a value is stored as; where K·σ decides which of two it is, their distance becomes its σ."""
    spread = K * y.sigma
    low, high = to_bfloat16(y.value - spread), to_bfloat16(y.value + spread)
    return Uncertain(to_bfloat16(y.value).astype(np.float64), (high.astype(np.float64) - low) ** 2)


def sum_error(n: int) -> float:
    """c(n): relative error of a sum of n products of about one size, whatever order it is summed in.

    Where some large products are followed by hundreds of small ones, each of these rounds a large partial sum: a sum of
    1,024 products, 144 of them hundreds of times larger than the others, has been seen at 9 σ in XLA.
    """
    return float(U * (np.sqrt(n) / 4 + 2))


def running_error(n: Any) -> Any:
    """d(n): what a sum of n products adds relative to its own value.

    Each of n additions rounds a partial sum. On their way to a large sum the partial sums are large too, however small
    the products are: about y·i/n after i of them, so that the squares of n roundings add up to (u·y)²·n/9.
    """
    return U * np.sqrt(n) / 3


def linear(
    x: Float[Uncertain, "*axes n"], weight: Shaped[np.ndarray, "m n"], bias: Shaped[np.ndarray, " m"] | None
) -> Float[Uncertain, "*axes m"]:
    """x times weight transposed, plus bias."""
    weight = np.array(weight, dtype=np.float64)
    value = _rows_times(x.value, weight)
    np.square(weight, out=weight)  # in place: a second array of this size costs more than the product
    variance = _rows_times(x.variance + sum_error(weight.shape[1]) ** 2 * x.value**2, weight)
    variance = variance + (running_error(weight.shape[1]) * value) ** 2
    if bias is not None:
        value = value + np.asarray(bias, dtype=np.float64)
        variance = variance + (U * value) ** 2
    return Uncertain(value, variance)


def _rows_times(x: Float[np.ndarray, "*axes n"], weight: Float[np.ndarray, "m n"]) -> Float[np.ndarray, "*axes m"]:
    """x times weight transposed, in one product instead of one for each leading index."""
    return (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], -1)


def rms_norm(
    z: Float[Uncertain, "*axes n"], weight: Shaped[np.ndarray, " n"], eps: float
) -> Float[Uncertain, "*axes n"]:
    """RMSNorm over the last axis with weight 1 + w."""
    size = z.value.shape[-1]
    gain = 1.0 + np.asarray(weight, dtype=np.float64)
    mean_square = (z.value**2).mean(axis=-1, keepdims=True) + eps
    y = z.value / np.sqrt(mean_square) * gain
    rho = np.sqrt((z.value**2 * z.variance).sum(axis=-1, keepdims=True)) / (size * mean_square)
    variance = z.variance * gain**2 / mean_square + y**2 * ((rho + sum_error(size) / 2) ** 2 + (4 * U) ** 2)
    return Uncertain(y, variance)


def rotate(
    y: Float[Uncertain, "*axes D"], angle: Float[np.ndarray, "*#axes {y.shape[-1]//2}"]
) -> Float[Uncertain, "*axes D"]:
    """Turn pairs (i, i + D/2) of the last axis by as many radians."""
    half = y.value.shape[-1] // 2
    first, second = y.value[..., :half], y.value[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    value = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    turning = (first**2 + second**2) * (2 * U * (np.abs(angle) + 1)) ** 2
    pair = y.variance[..., :half] + y.variance[..., half:] + turning
    return Uncertain(value, np.concatenate([pair, pair], axis=-1))


def scores(
    q: Float[Uncertain, "*heads T D"],
    k: Float[Uncertain, "*heads L D"],
    scale: float,
    softcap: float | None,
    visible: Bool[np.ndarray, "*#heads T L"],
) -> Float[Uncertain, "*heads T L"]:
    """Scaled, softcapped scores of q and k; hidden ones are -inf with variance 0."""
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


def softmax_average(
    s: Float[Uncertain, "*heads T L"], v: Float[Uncertain, "*#heads L D"]
) -> Float[Uncertain, "*heads T D"]:
    """Softmax of s over L, averaging v; a row with nothing visible gives exactly 0."""
    top = s.value.max(axis=-1, keepdims=True, initial=-np.inf)
    weight = np.exp(s.value - np.where(np.isfinite(top), top, 0.0))
    total = weight.sum(axis=-1, keepdims=True)
    p = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    o = p @ v.value
    pull = score_pull(p, s) ** 2  # Σ g²(v − o)², multiplied out
    spread = pull @ v.value**2 - 2 * o * (pull @ v.value) + o**2 * pull.sum(axis=-1, keepdims=True)
    summing = p**2 @ (sum_error(s.value.shape[-1]) ** 2 * v.value**2 + v.variance)
    squares = (p**2).sum(axis=-1, keepdims=True)
    keys = np.divide(1.0, squares, out=np.zeros_like(squares), where=squares > 0)  # how many keys share the weight
    running = (2 * U * o) ** 2 + (running_error(keys) * o) ** 2
    return Uncertain(o, np.maximum(spread, 0.0) + summing + running)


def score_pull(
    p: Float[np.ndarray, "*heads T L"], s: Float[Uncertain, "*heads T L"]
) -> Float[np.ndarray, "*heads T L"]:
    """How far one σ of each score moves the average towards its value: g, with p the softmax of s.

    To first order g = p·σ. Where scores are so uncertain that a key with next to no weight may win (large scores at
    far positions, where an angle is known to a hundredth), K standard deviations move it by the exact
    p·E / (1 + p·E), E = exp(K·τ) − 1, and what that exceeds first order is added; τ is the deviation of the score
    from the others'.
    """
    sigma = s.sigma
    steps = K * np.sqrt(s.variance + (p**2 * s.variance).sum(axis=-1, keepdims=True))
    rise = p * np.expm1(np.minimum(steps, STEEPEST))
    return p * sigma + np.maximum(rise / (1 + rise) - p * steps, 0.0) / K
