"""The oracle: SPEC.md in NumPy float64, obvious rather than fast, each value with its float32 rounding deviation σ.

It takes the literal form of every clause: positions of the Lyra stream are P + t, static keys sit where they say, one
softmax runs over static and live keys together. It knows no cache: how calls are cut has no effect (LIVE-4), so all
live tokens of a sequence come at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .array_types import Bool, Float, Int
from .attention import AttentionSpec
from .inputs import StaticLayer, check_call, check_dtype
from .uncertain import (
    Uncertain,
    exact,
    linear,
    rms_norm,
    rotate,
    rounded,
    scores,
    softmax_average,
    stored,
    stored_turned,
)

ELEMENTS_PER_TILE = 2**22
"""Elements of keys handled at once, so that a long context does not fill the memory."""


class Stream(NamedTuple):
    """What one kind of heads attends with: q [B,T,Hq,D], live k [B,T,Hkv,D], static k [Bc,Hs,S,D] or None."""

    q: Float[Uncertain, "B T Hq D"]
    k: Float[Uncertain, "B T Hkv D"]
    static_k: Float[Uncertain, "Bc Hs S D"] | None


def reference(
    spec: AttentionSpec,
    weights: Mapping[str, np.ndarray],
    x: Float[np.ndarray, "B T E"],
    *,
    positions: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"] | None = None,
    static: StaticLayer | None = None,
    dtype: str = "float32",
) -> dict[str, Uncertain]:
    """Every stage of the layer for all live tokens of a sequence, by trace name (ORDER-3), with σ.

    `dtype` is the type a backend would store stages in, "float32" or "bfloat16" (DTYPE); the values are float64 either
    way, and what comes in is taken as it is. Raises InputError.
    """
    check_dtype(dtype)
    x, positions, mask, static = check_call(spec, x, positions, mask, static)
    return stages_of(spec, weights, exact(x), positions, mask, static, dtype)


def stages_of(
    spec: AttentionSpec,
    weights: Mapping[str, np.ndarray],
    x: Float[Uncertain, "B T {spec.hidden_size}"],
    positions: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    static: StaticLayer | None,
    dtype: str = "float32",
) -> dict[str, Uncertain]:
    """The same for checked arguments and an x that may itself be uncertain."""
    stages = {"q_proj": project(spec, weights, "q", x), "k_proj": project(spec, weights, "k", x)}
    stages["v_proj"] = project(spec, weights, "v", x)
    stages = {name: stored(value, dtype) for name, value in stages.items()}
    q, k = stages["q_proj"], stages["k_proj"]
    if spec.qk_norm is not None:
        q = stages["q_norm"] = stored(rms_norm(q, weights["q_norm.weight"], spec.qk_norm.eps), dtype)
        k = stages["k_norm"] = stored(rms_norm(k, weights["k_norm.weight"], spec.qk_norm.eps), dtype)
    lyra_q, lyra_k, lyra_static = q, k, static_keys(spec, static)
    if spec.rope is not None:
        behind = positions + context_end(spec, static)[:, None]
        lyra_q, lyra_k = stored_turned(at(spec, q, behind), dtype), stored_turned(at(spec, k, behind), dtype)
        lyra_static = None if lyra_static is None else stored_turned(lyra_static, dtype)
        q = stages["q_rope"] = stored(at(spec, q, positions), dtype)
        k = stages["k_rope"] = stored(at(spec, k, positions), dtype)
    vanilla, lyra = Stream(q, k, None), Stream(lyra_q, lyra_k, lyra_static)
    stages["heads"] = stored(attend(spec, vanilla, lyra, stages["v_proj"], positions, mask, static), dtype)
    stages["output"] = stored(output(spec, weights, stages["heads"]), dtype)
    return stages


def stage_from_trace(
    spec: AttentionSpec,
    weights: Mapping[str, np.ndarray],
    name: str,
    trace: Mapping[str, np.ndarray],
    x: Float[np.ndarray, "B T E"],
    *,
    positions: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"] | None = None,
    static: StaticLayer | None = None,
    dtype: str = "float32",
    moved: bool = False,
) -> Uncertain:
    """One stage, computed from a backend's own values of the stages before it, taken as exact (TOLERANCE-2).

    `trace` holds those values for all live tokens of the sequence. The stage itself is not rounded, whatever `dtype`
    is; with "bfloat16" what is rotated again for Lyra heads is. `moved` takes the other form that POSITION allows:
    static keys at j - P, live tokens at t. Raises InputError, KeyError for an unknown stage.
    """
    x, positions, mask, static = check_call(spec, x, positions, mask, static)
    before = {key: exact(value) for key, value in trace.items()}
    kind, _, stage = name.partition("_")
    if stage == "proj":
        return project(spec, weights, kind, exact(x))
    if stage == "norm":
        assert spec.qk_norm is not None
        return rms_norm(before[f"{kind}_proj"], weights[f"{kind}_norm.weight"], spec.qk_norm.eps)
    normed = "norm" if spec.qk_norm is not None else "proj"
    if stage == "rope":
        return at(spec, before[f"{kind}_{normed}"], positions)
    if name == "heads":
        last = "rope" if spec.rope is not None else normed
        vanilla = Stream(before[f"q_{last}"], before[f"k_{last}"], None)
        end = context_end(spec, static)[:, None]
        q, k, turned = vanilla.q, vanilla.k, static_keys(spec, static, end if moved else 0)
        if spec.rope is not None and not moved:  # a trace is at t in every mode (ORDER-3); Lyra heads attend at P + t
            q, k = (at(spec, before[f"{kind}_{normed}"], positions + end) for kind in "qk")
            q, k = (q, k) if dtype == "float32" else (rounded(q), rounded(k))
        lyra = Stream(q, k, turned if turned is None or dtype == "float32" else rounded(turned))
        return attend(spec, vanilla, lyra, before["v_proj"], positions, mask, static)
    if name == "output":
        return output(spec, weights, before["heads"])
    raise KeyError(f"unknown stage {name!r}; the stages are {spec.trace_names()}")


def context_end(spec: AttentionSpec, static: StaticLayer | None) -> Int[np.ndarray, " Bc"]:
    """P per context row: one more than the highest visible static position, 0 without one (POSITION-1, -2)."""
    if static is None or spec.static.positions == "overlay":
        return np.zeros(1, dtype=np.int64)
    return np.max(np.where(static.mask, static.positions + 1, 0), axis=1, initial=0)


def project(
    spec: AttentionSpec, weights: Mapping[str, np.ndarray], kind: str, x: Float[Uncertain, "B T {spec.hidden_size}"]
) -> Float[Uncertain, "B T H {spec.head_dim}"]:
    """Heads of kind "q", "k" or "v", projected from x (ORDER-1)."""
    flat = linear(x, weights[f"{kind}_proj.weight"], weights[f"{kind}_proj.bias"] if spec.bias else None)
    shape = (*x.value.shape[:2], -1, spec.head_dim)
    return Uncertain(flat.value.reshape(shape), flat.variance.reshape(shape))


def at(
    spec: AttentionSpec, y: Float[Uncertain, "B T H D"], positions: Int[np.ndarray, "B T"]
) -> Float[Uncertain, "B T H D"]:
    """y rotated at positions; y itself where the spec has no RoPE."""
    return y if spec.rope is None else rotate(y, angles(spec, positions)[:, :, None, :])


def angles(spec: AttentionSpec, positions: Int[np.ndarray, "*axes"]) -> Float[np.ndarray, "*axes {spec.head_dim//2}"]:
    """The angles of positions (ROPE-2)."""
    assert spec.rope is not None
    exponent = np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim
    return positions[..., None] * (spec.rope.theta**-exponent / spec.rope.factor)


def static_keys(
    spec: AttentionSpec, static: StaticLayer | None, back: Int[np.ndarray, "#Bc 1"] | int = 0
) -> Float[Uncertain, "Bc Hs S D"] | None:
    """Static keys, rotated at their positions, or `back` behind them."""
    if static is None:
        return None
    if spec.rope is None:
        return exact(static.k)
    return rotate(exact(static.k), angles(spec, static.positions - back)[:, None])


def attend(
    spec: AttentionSpec,
    vanilla: Stream,
    lyra: Stream,
    v: Float[Uncertain, "B T Hkv D"],
    positions: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    static: StaticLayer | None,
) -> Float[Uncertain, "B T Hq D"]:
    """The heads' outputs. Clauses SCALE, SPLIT, STATIC, LIVE, MASKED, SLIDING."""
    batch, tokens = positions.shape
    shape = (batch, tokens, spec.num_attention_heads, spec.head_dim)
    out = Uncertain(np.zeros(shape), np.zeros(shape))
    live = visible_live(spec, positions, mask)
    lyra_heads = np.array(spec.lyra_q_heads, dtype=int)
    vanilla_heads = np.setdiff1d(np.arange(spec.num_attention_heads), lyra_heads)
    for heads, stream, visible, context in (
        (vanilla_heads, vanilla, live["causal"], None),
        (lyra_heads, lyra, live[spec.static.live], static),
    ):
        keys = tokens + (context.k.shape[2] if context is not None else 0)
        tile = max(1, ELEMENTS_PER_TILE // max(1, batch * keys * spec.head_dim))
        for start in range(0, len(heads), tile):
            some = heads[start : start + tile]
            attended = _heads(spec, some, stream, v, visible, context)
            out.value[:, :, some] = attended.value.swapaxes(1, 2)
            out.variance[:, :, some] = attended.variance.swapaxes(1, 2)
    return out


def visible_live(
    spec: AttentionSpec, positions: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]
) -> dict[str, Bool[np.ndarray, "B T T"]]:
    """Which live keys a query sees, by live mode; vanilla heads are "causal" (LIVE, SLIDING, MASKED)."""
    causal = positions[:, None, :] <= positions[:, :, None]
    if spec.sliding_window is not None:
        causal &= positions[:, None, :] > positions[:, :, None] - spec.sliding_window
    causal = causal & mask[:, None, :]
    itself = causal & np.eye(positions.shape[1], dtype=bool)
    return {"causal": causal, "self": itself, "none": np.zeros_like(causal)}


def _heads(
    spec: AttentionSpec,
    heads: Int[np.ndarray, " h"],
    stream: Stream,
    v: Float[Uncertain, "B T Hkv D"],
    visible: Bool[np.ndarray, "B T T"],
    static: StaticLayer | None,
) -> Float[Uncertain, "B h T D"]:
    """Some query heads of one stream: one softmax over static keys, then live keys."""
    query, key, value, seen = by_head(spec, heads, stream, v, visible, static)
    return softmax_average(scores(query, key, spec.scale, spec.softcap, seen), value)


def by_head(
    spec: AttentionSpec,
    heads: Int[np.ndarray, " h"],
    stream: Stream,
    v: Float[Uncertain, "B T Hkv D"],
    visible: Bool[np.ndarray, "B T T"],
    static: StaticLayer | None,
) -> tuple[
    Float[Uncertain, "B h T D"],
    Float[Uncertain, "B h L D"],
    Float[Uncertain, "B h L D"],
    Bool[np.ndarray, "B 1 T L"],
]:
    """What some query heads of a stream attend with: query, key, value and visible, L being S + T.

    Static keys stand before live ones; `visible` is what the heads see of the live ones.
    """
    batch, tokens = visible.shape[:2]
    kv_heads = heads // spec.group_size

    def pick(y: Uncertain, index: np.ndarray) -> Uncertain:
        return Uncertain(y.value[:, :, index].swapaxes(1, 2), y.variance[:, :, index].swapaxes(1, 2))

    query, key, value = pick(stream.q, heads), pick(stream.k, kv_heads), pick(v, kv_heads)
    visible = visible[:, None]
    if static is not None and stream.static_k is not None:
        group = np.searchsorted(spec.lyra_kv_heads, kv_heads)
        key = _before(stream.static_k.pick((slice(None), group)), key)
        value = _before(exact(static.v[:, group]), value)
        seen = np.broadcast_to(static.mask[:, None, None, :], (batch, 1, tokens, static.mask.shape[1]))
        visible = np.concatenate([seen, visible], axis=-1)
    return query, key, value, visible


def _before(static: Float[Uncertain, "#B h S D"], live: Float[Uncertain, "B h T D"]) -> Float[Uncertain, "B h S+T D"]:
    """Static keys or values in front of live ones."""
    batch = live.value.shape[0]

    def join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.concatenate([np.broadcast_to(a, (batch, *a.shape[1:])), b], axis=2)

    return Uncertain(join(static.value, live.value), join(static.variance, live.variance))


def output(
    spec: AttentionSpec, weights: Mapping[str, np.ndarray], heads: Float[Uncertain, "B T Hq D"]
) -> Float[Uncertain, "B T {spec.hidden_size}"]:
    """Heads, concatenated and projected (ORDER-1)."""
    flat = (*heads.value.shape[:2], spec.num_attention_heads * spec.head_dim)
    concatenated = Uncertain(heads.value.reshape(flat), heads.variance.reshape(flat))
    return linear(concatenated, weights["o_proj.weight"], weights["o_proj.bias"] if spec.bias else None)
