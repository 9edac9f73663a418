"""The oracle's gradients: the backward pass of one layer in NumPy float64, each value with its float32 deviation σ.

Like the oracle it takes the literal form of every clause: queries and keys of the Lyra stream sit at P + t, one softmax
runs over static and live keys together. Each function is the transpose of one row of SPEC.md's table TOLERANCE, and σ
follows by the same rules: rounding errors count as independent and propagate to first order, a sum of n products adds
c(n) and d(n). So one constant K serves values and gradients alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .array_types import Bool, Float, Int, Shaped
from .attention import AttentionSpec
from .inputs import StaticLayer, check_call, check_cotangent
from .reference import Stream, angles, at, by_head, context_end, reference, static_keys, visible_live
from .uncertain import U, Uncertain, exact, linear, rms_norm, rotate, running_error, scores, softmax_average, sum_error

SMALLEST = 2.0**-126
"""The smallest normal float32: a weight of a softmax, or a product, may come out as 0 below it."""


class OracleGradients(NamedTuple):
    """Gradients of sum(cotangent · output), in the shapes of what they belong to; static_k, static_v None without."""

    x: Float[Uncertain, "B T E"]
    weights: dict[str, Uncertain]
    static_k: Float[Uncertain, "Bc Hs S D"] | None
    static_v: Float[Uncertain, "Bc Hs S D"] | None


class Attended(NamedTuple):
    """Gradients of what heads attend with: queries, live keys and values, static ones or None."""

    q: Float[Uncertain, "B T Hq D"]
    k: Float[Uncertain, "B T Hkv D"]
    v: Float[Uncertain, "B T Hkv D"]
    static_k: Float[Uncertain, "Bc Hs S D"] | None
    static_v: Float[Uncertain, "Bc Hs S D"] | None


def gradients(
    spec: AttentionSpec,
    weights: Mapping[str, np.ndarray],
    cotangent: Float[np.ndarray, "B T E"],
    x: Float[np.ndarray, "B T E"],
    *,
    positions: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"] | None = None,
    static: StaticLayer | None = None,
) -> OracleGradients:
    """Gradients of one call without a cache. Clause GRAD.

    Padding and masked static slots have no influence (MASKED-1), so they enter as zeros, and their gradients are
    exactly 0, with σ = 0. Raises InputError.
    """
    inputs = check_call(spec, x, positions, mask, static)
    upstream = exact(check_cotangent(cotangent, inputs))
    x = np.where(inputs.mask[:, :, None], inputs.x, 0.0)
    shown = None if inputs.static is None else _without_hidden(inputs.static)
    stages = reference(spec, weights, x, positions=inputs.positions, mask=inputs.mask, static=shown)
    found: dict[str, Uncertain] = {}
    flat = stages["heads"].value.shape[:2]
    heads = _reshaped(stages["heads"], (*flat, -1))
    of_heads = _linear_back("o_proj", upstream, heads, weights, found)
    of_heads = _reshaped(of_heads, stages["heads"].value.shape)
    back = _attend_back(spec, stages, of_heads, inputs.positions, inputs.mask, shown)
    of_x = exact(np.zeros_like(x, dtype=np.float64))
    for name, of_stage in (("q", back.q), ("k", back.k), ("v", back.v)):
        if spec.qk_norm is not None and name != "v":
            norm = f"{name}_norm.weight"
            before = stages[f"{name}_proj"]
            of_stage, found[norm] = rms_norm_back(of_stage, before, weights[norm], spec.qk_norm.eps)
        of_flat = _reshaped(of_stage, (*flat, -1))
        of_x = added(of_x, _linear_back(f"{name}_proj", of_flat, exact(x), weights, found))
    return OracleGradients(of_x, found, back.static_k, back.static_v)


def contract(subscripts: str, a: Float[Uncertain, "*of_a"], b: Float[Uncertain, "*of_b"]) -> Float[Uncertain, "*out"]:
    """An einsum of two arrays, each element a sum of n products. Adds c(n), d(n) and, where it errs, SMALLEST."""
    inputs, _, out = subscripts.partition("->")
    sizes = dict(zip(inputs.replace(",", ""), (*a.value.shape, *b.value.shape), strict=True))
    terms = int(np.prod([size for axis, size in sizes.items() if axis not in out]))

    def sum_of(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.einsum(subscripts, first, second, optimize=True)

    variance = sum_of(a.variance + sum_error(terms) ** 2 * a.value**2, b.value**2) + sum_of(a.value**2, b.variance)
    value = sum_of(a.value, b.value)
    variance = variance + (running_error(terms) * value) ** 2
    return Uncertain(value, np.where(variance > 0, variance + SMALLEST**2, 0.0))


def added(a: Float[Uncertain, "*axes"], b: Float[Uncertain, "*#axes"]) -> Float[Uncertain, "*axes"]:
    """a + b, rounded once."""
    value = a.value + b.value
    return Uncertain(value, a.variance + b.variance + (U * value) ** 2)


def times(a: Float[Uncertain, "*axes"], b: Float[Uncertain, "*#axes"]) -> Float[Uncertain, "*axes"]:
    """a · b element by element, rounded once."""
    value = a.value * b.value
    return Uncertain(value, a.variance * b.value**2 + a.value**2 * b.variance + (U * value) ** 2)


def rms_norm_back(
    upstream: Float[Uncertain, "B T H D"], z: Float[Uncertain, "B T H D"], weight: Shaped[np.ndarray, " D"], eps: float
) -> tuple[Float[Uncertain, "B T H D"], Float[Uncertain, " D"]]:
    """Gradients of z, (h − n·mean(h·n)) / rms with n = z / rms and h = upstream · (1 + w); and of weight."""
    size = z.value.shape[-1]
    normed = rms_norm(z, np.zeros(size), eps)
    of_weight = contract("bthd,bthd->d", upstream, normed)
    inner = times(upstream, exact(np.broadcast_to(1.0 + weight.astype(np.float64), z.value.shape)))
    mean = contract("bthd,bthd->bth", inner, normed)
    along = times(normed, Uncertain(mean.value[..., None] / size, mean.variance[..., None] / size**2))
    across = added(inner, Uncertain(-along.value, along.variance))
    mean_square = (z.value**2).mean(axis=-1, keepdims=True) + eps
    rho = np.sqrt((z.value**2 * z.variance).sum(axis=-1, keepdims=True)) / (size * mean_square) + sum_error(size)
    inverse = 1.0 / np.sqrt(mean_square)
    return times(across, Uncertain(inverse, (inverse * rho) ** 2)), of_weight


def softmax(s: Float[Uncertain, "*heads T L"]) -> Float[Uncertain, "*heads T L"]:
    """Softmax over the last axis; a row with nothing visible (all -inf) gives exactly 0."""
    visible = np.isfinite(s.value)
    top = s.value.max(axis=-1, keepdims=True, initial=-np.inf)
    weight = np.exp(s.value - np.where(np.isfinite(top), top, 0.0))
    total = weight.sum(axis=-1, keepdims=True)
    p = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    others = (p**2 * s.variance).sum(axis=-1, keepdims=True)
    relative = s.variance * np.maximum(1.0 - 2.0 * p, 0.0) + others + sum_error(s.value.shape[-1]) ** 2
    return Uncertain(p, np.where(visible, p**2 * relative + SMALLEST**2, 0.0))


def scores_back(
    s: Float[Uncertain, "*heads T L"],
    p: Float[Uncertain, "*heads T L"],
    of_p: Float[Uncertain, "*heads T L"],
    mean: Float[Uncertain, "*heads T 1"],
    softcap: float | None,
) -> Float[Uncertain, "*heads T L"]:
    """Gradient of the raw scores: p · (of_p − mean), through tanh where there is a softcap.

    mean is Σ p · of_p, which is upstream · output.
    """
    of_s = times(p, added(of_p, Uncertain(-mean.value, mean.variance)))
    if softcap is None:
        return of_s
    tanh = np.where(np.isfinite(s.value), s.value, 0.0) / softcap
    slope = Uncertain(1.0 - tanh**2, (2.0 * tanh / softcap) ** 2 * s.variance + (4 * U) ** 2)
    return times(of_s, slope)


def _without_hidden(static: StaticLayer) -> StaticLayer:
    shown = static.mask[:, None, :, None]
    return static._replace(k=np.where(shown, static.k, 0.0), v=np.where(shown, static.v, 0.0))


def _reshaped(y: Float[Uncertain, "*axes"], shape: tuple[int, ...]) -> Float[Uncertain, "*other"]:
    return Uncertain(y.value.reshape(shape), y.variance.reshape(shape))


def _linear_back(
    name: str,
    upstream: Float[Uncertain, "B T m"],
    x: Float[Uncertain, "B T n"],
    weights: Mapping[str, np.ndarray],
    found: dict[str, Uncertain],
) -> Float[Uncertain, "B T n"]:
    """Gradient of x from that of x · Wᵀ (+ bias); those of the weight and the bias go into `found`."""
    found[f"{name}.weight"] = contract("btm,btn->mn", upstream, x)
    if f"{name}.bias" in weights:
        found[f"{name}.bias"] = contract("btm,bt->m", upstream, exact(np.ones(x.value.shape[:2])))
    return linear(upstream, np.asarray(weights[f"{name}.weight"]).T, None)


def _attend_back(
    spec: AttentionSpec,
    stages: Mapping[str, Uncertain],
    of_heads: Float[Uncertain, "B T Hq D"],
    positions: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    static: StaticLayer | None,
) -> Attended:
    """Back through attention and RoPE, stream by stream. Clauses SPLIT, STATIC, LIVE, POSITION."""
    normed = "norm" if spec.qk_norm is not None else "proj"
    q, k, v = stages[f"q_{normed}"], stages[f"k_{normed}"], stages["v_proj"]
    lyra_heads = np.array(spec.lyra_q_heads, dtype=int)
    vanilla_heads = np.setdiff1d(np.arange(spec.num_attention_heads), lyra_heads)
    behind = positions + context_end(spec, static)[:, None]
    live = visible_live(spec, positions, mask)
    streams = []
    for heads, places, visible, context in (
        (vanilla_heads, positions, live["causal"], None),
        (lyra_heads, behind, live[spec.static.live], static),
    ):
        stream = Stream(at(spec, q, places), at(spec, k, places), static_keys(spec, context))
        part = _stream_back(spec, heads, stream, v, of_heads, visible, context)
        streams.append(part._replace(q=at(spec, part.q, -places), k=at(spec, part.k, -places)))
    vanilla, lyra = streams
    return lyra._replace(q=added(vanilla.q, lyra.q), k=added(vanilla.k, lyra.k), v=added(vanilla.v, lyra.v))


def _stream_back(
    spec: AttentionSpec,
    heads: Int[np.ndarray, " h"],
    stream: Stream,
    v: Float[Uncertain, "B T Hkv D"],
    of_heads: Float[Uncertain, "B T Hq D"],
    visible: Bool[np.ndarray, "B T T"],
    static: StaticLayer | None,
) -> Attended:
    """What one stream's heads give back to their rotated queries, live keys and values, and stored static ones."""
    query, key, value, seen = by_head(spec, heads, stream, v, visible, static)
    upstream = Uncertain(*(part[:, :, heads].swapaxes(1, 2) for part in of_heads))
    s = scores(query, key, spec.scale, spec.softcap, seen)
    p = softmax(s)
    mean = contract("bhtd,bhtd->bht", upstream, softmax_average(s, value))
    of_p = contract("bhtd,bhld->bhtl", upstream, value)
    of_s = scores_back(s, p, of_p, mean.pick((..., None)), spec.softcap)
    of_s = Uncertain(spec.scale * of_s.value, spec.scale**2 * of_s.variance)
    of_query = contract("bhtl,bhld->bhtd", of_s, key)
    of_key = contract("bhtl,bhtd->bhld", of_s, query)
    of_value = contract("bhtl,bhtd->bhld", p, upstream)

    slots = key.value.shape[2] - visible.shape[2]
    kv_heads = np.arange(spec.num_key_value_heads)
    readers = heads // spec.group_size
    of_q, of_k, of_v = (
        Uncertain(*(part.swapaxes(1, 2) for part in by_head_first))
        for by_head_first in (
            _summed(of_query, heads, np.arange(spec.num_attention_heads)),
            _summed(of_key.pick(np.s_[:, :, slots:]), readers, kv_heads),
            _summed(of_value.pick(np.s_[:, :, slots:]), readers, kv_heads),
        )
    )
    if static is None:
        return Attended(of_q, of_k, of_v, None, None)
    static_heads = np.array(spec.lyra_kv_heads, dtype=int)
    of_static_k = _of_rows(_summed(of_key.pick(np.s_[:, :, :slots]), readers, static_heads), len(static.k))
    of_static_v = _of_rows(_summed(of_value.pick(np.s_[:, :, :slots]), readers, static_heads), len(static.k))
    if spec.rope is not None:
        of_static_k = rotate(of_static_k, -angles(spec, static.positions)[:, None])
    return Attended(of_q, of_k, of_v, of_static_k, of_static_v)


def _summed(
    y: Float[Uncertain, "B h L D"], heads: Int[np.ndarray, " h"], onto: Int[np.ndarray, " H"]
) -> Float[Uncertain, "B H L D"]:
    """The parts of some heads, summed by what head they belong to."""
    belongs = (heads[None, :] == onto[:, None]).astype(np.float64)
    return Uncertain(*(np.einsum("oh,bhld->bold", belongs, part) for part in y))


def _of_rows(y: Float[Uncertain, "B Hs S D"], rows: int) -> Float[Uncertain, "Bc Hs S D"]:
    """A gradient of every row, summed over the rows where all of them read one context."""
    return Uncertain(*(part.sum(axis=0, keepdims=True) for part in y)) if rows == 1 else y
