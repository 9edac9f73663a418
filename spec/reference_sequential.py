"""The oracle of an injected block: clause SEQUENTIAL in NumPy float64, each value with the σ of its float32 rounding.

All live tokens of a sequence come at once, as in `lyra.spec.reference`, which does the block's attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .array_types import Bool, Float, Int
from .attention import AttentionSpec
from .inputs import StaticLayer, check_block_call, check_call
from .reference import Stream, at, attend, output, project, stage_from_trace, stages_of
from .sequential import SequentialSpec
from .uncertain import U, Uncertain, exact, rms_norm


class OwnKeys(NamedTuple):
    """What the cache of a layer's own attention holds: k, rotated at t, and v."""

    k: Float[Uncertain, "B T Hkv D"]
    v: Float[Uncertain, "B T Hkv D"]


def own_keys(
    spec: AttentionSpec,
    weights: Mapping[str, np.ndarray],
    x: Float[np.ndarray, "B T E"],
    *,
    positions: Int[np.ndarray, "B T"],
) -> OwnKeys:
    """Keys and values that a layer keeps of all its live tokens. Raises InputError."""
    x, positions, _, _ = check_call(spec, x, positions, None, None)
    k, v = (project(spec, weights, kind, exact(x)) for kind in "kv")
    if spec.qk_norm is not None:
        k = rms_norm(k, weights["k_norm.weight"], spec.qk_norm.eps)
    return OwnKeys(at(spec, k, positions), v)


def reference_sequential(
    spec: SequentialSpec,
    weights: Mapping[str, np.ndarray],
    h: Float[np.ndarray, "B T E"],
    *,
    positions: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"] | None = None,
    static: StaticLayer | None = None,
    own: OwnKeys | None = None,
) -> dict[str, Uncertain]:
    """Every stage of the block for all live tokens of a sequence, by trace name (SEQUENTIAL-8), with σ.

    `own` stands for the cache that source "own" reads. Raises InputError.
    """
    h, positions, mask, static = check_block_call(spec, h, positions, mask, static, own)
    stages = {"input_norm": rms_norm(exact(h), weights["input_norm.weight"], spec.norm_eps)}
    if spec.source == "own" and own is not None:
        stages |= _query_stages(spec.attention, weights, stages["input_norm"], positions)
        stages["heads"] = _attend_own(spec.attention, stages, own, positions, mask)
        y = stages["attention"] = output(spec.attention, weights, stages["heads"])
    else:
        stages |= stages_of(spec.attention, weights, stages["input_norm"], positions, mask, static)
        y = stages["attention"] = stages.pop("output")
    if spec.output_norm:
        y = stages["output_norm"] = rms_norm(y, weights["output_norm.weight"], spec.norm_eps)
    stages["output"] = join(spec, h, y)
    return stages


def block_stage_from_trace(
    spec: SequentialSpec,
    weights: Mapping[str, np.ndarray],
    name: str,
    trace: Mapping[str, np.ndarray],
    h: Float[np.ndarray, "B T E"],
    *,
    positions: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"] | None = None,
    static: StaticLayer | None = None,
    own: OwnKeys | None = None,
) -> Uncertain:
    """One stage, computed from a backend's own values of the stages before it, taken as exact (TOLERANCE-2).

    `trace` holds those values for all live tokens of the sequence. Raises InputError, KeyError for an unknown stage.
    """
    h, positions, mask, static = check_block_call(spec, h, positions, mask, static, own)
    if name == "input_norm":
        return rms_norm(exact(h), weights["input_norm.weight"], spec.norm_eps)
    if name == "output_norm":
        return rms_norm(exact(trace["attention"]), weights["output_norm.weight"], spec.norm_eps)
    if name == "output":
        return join(spec, h, exact(trace["output_norm" if spec.output_norm else "attention"]))
    if name == "heads" and spec.source == "own" and own is not None:
        before = {key: exact(value) for key, value in trace.items()}
        return _attend_own(spec.attention, before, own, positions, mask)
    inner = "output" if name == "attention" else name
    x = trace["input_norm"]
    return stage_from_trace(spec.attention, weights, inner, trace, x, positions=positions, mask=mask, static=static)


def join(
    spec: SequentialSpec, h: Float[np.ndarray, "B T E"], y: Float[Uncertain, "B T E"]
) -> Float[Uncertain, "B T E"]:
    """(h if residual else 0) + gate · y; where gate · y is 0, h is exact (SEQUENTIAL-1, -3)."""
    change = spec.gate * y.value
    variance = spec.gate**2 * y.variance + (2 * U * change) ** 2
    if not spec.residual:
        return Uncertain(change, variance)
    value = h.astype(np.float64) + change
    return Uncertain(value, variance + np.where(change != 0, (U * value) ** 2, 0.0))


def _query_stages(
    spec: AttentionSpec,
    weights: Mapping[str, np.ndarray],
    x: Float[Uncertain, "B T E"],
    positions: Int[np.ndarray, "B T"],
) -> dict[str, Uncertain]:
    """The stages of queries alone, x being the normed h."""
    stages = {"q_proj": (q := project(spec, weights, "q", x))}
    if spec.qk_norm is not None:
        stages["q_norm"] = q = rms_norm(q, weights["q_norm.weight"], spec.qk_norm.eps)
    if spec.rope is not None:
        stages["q_rope"] = at(spec, q, positions)
    return stages


def _attend_own(
    spec: AttentionSpec,
    stages: Mapping[str, Uncertain],
    own: OwnKeys,
    positions: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
) -> Float[Uncertain, "B T Hq D"]:
    """The heads of the last query stage over the layer's own keys and values (SEQUENTIAL-5)."""
    q = next(stages[name] for name in ("q_rope", "q_norm", "q_proj") if name in stages)
    stream = Stream(q, own.k, None)
    return attend(spec, stream, stream, own.v, positions, mask, None)
