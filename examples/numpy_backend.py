"""A third backend, whole: NumPy in float32, obvious rather than fast. It conforms:

PYTHONPATH=examples lyra conform --backend numpy_backend:NumpyBackend
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lyra.backends.protocol import Result
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer, check_call, check_weights


class NumpyBackend:
    """Makes attention layers. No gradients and no whole models: what needs them is unsupported, not failed."""

    name = "numpy"
    capabilities = frozenset({"static", "cache", "trace", "reorder", "crop"})

    def attention(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> NumpyAttention:
        """One layer. Raises InputError for weights that do not fit."""
        return NumpyAttention(spec, {name: weight.copy() for name, weight in check_weights(spec, weights).items()})


class Cache(NamedTuple):
    """Live keys, rotated, and values [B,L,Hkv,D], which of them are real and where they sit [B,L]."""

    k: np.ndarray
    v: np.ndarray
    mask: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class NumpyAttention:
    """One attention layer with its weights."""

    spec: AttentionSpec
    weights: dict[str, np.ndarray]

    def __call__(
        self,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
        cache: Any = None,
        trace: bool = False,
    ) -> Result:
        """See `lyra.backends.protocol.Attention`. Raises InputError."""
        x, positions, mask, static = check_call(self.spec, x, positions, mask, static)
        x = np.where(mask[..., None], x, 0)  # whatever padding holds, it must not overflow on its way
        shape = (*x.shape[:2], -1, self.spec.head_dim)
        stages = {f"{name}_proj": self._linear(name, x).reshape(shape) for name in "qkv"}
        q, k, v = stages.values()
        if self.spec.qk_norm is not None:
            q = stages["q_norm"] = rms_norm(q, self.weights["q_norm.weight"], self.spec.qk_norm.eps)
            k = stages["k_norm"] = rms_norm(k, self.weights["k_norm.weight"], self.spec.qk_norm.eps)
        if self.spec.rope is not None:
            q = stages["q_rope"] = rotate(self.spec, q, positions)
            k = stages["k_rope"] = rotate(self.spec, k, positions)
        new = Cache(*(part.copy() for part in (k, v, mask, positions)))  # the arrays are the caller's (clause ARRAYS)
        live = new if cache is None else Cache(*(np.concatenate(pair, axis=1) for pair in zip(cache, new, strict=True)))
        heads = stages["heads"] = attend(self.spec, q, live, positions, static)
        output = stages["output"] = self._linear("o", heads.reshape(*x.shape[:2], -1))
        return Result(output, live, stages if trace else {})

    def reorder(self, cache: Cache, rows: np.ndarray) -> Cache:
        """Rows of a live cache."""
        return Cache(*(part[rows] for part in cache))

    def crop(self, cache: Cache, length: int) -> Cache:
        """The first tokens of a live cache."""
        return Cache(*(part[:, :length] for part in cache))

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.weights[f"{name}_proj.weight"].T
        return y + self.weights[f"{name}_proj.bias"] if self.spec.bias else y


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Over the last axis, weight 1 + w (clause NORM)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * (1 + weight)


def rotate(spec: AttentionSpec, y: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """y [B,T,H,D] at positions [B,T]; angles in float64, because positions reach 131,072 (clause ROPE)."""
    assert spec.rope is not None
    pairs = np.arange(0, spec.head_dim, 2) / spec.head_dim
    angles = positions[..., None, None] * (spec.rope.theta**-pairs / spec.rope.factor)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = np.split(y, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def visible_keys(spec: AttentionSpec, live: Cache, positions: np.ndarray) -> np.ndarray:
    """[B,Hq,T,L] bool: which live keys a head sees (clauses LIVE, SLIDING, MASKED)."""
    tokens, length = positions.shape[1], live.mask.shape[1]
    here, there = positions[:, None, :, None], live.positions[:, None, None, :]
    causal = (there <= here) & live.mask[:, None, None, :]
    if spec.sliding_window is not None:
        causal &= there > here - spec.sliding_window
    own = np.arange(length) == np.arange(length - tokens, length)[:, None]
    lyra = causal & np.where(own, spec.static.sees.own, spec.static.sees.earlier)
    heads = np.arange(spec.num_attention_heads)[:, None, None]
    return np.where(np.isin(heads, spec.lyra_q_heads), lyra, causal)


def scores(spec: AttentionSpec, q: np.ndarray, k: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """q [B,H,T,D] on k [B or 1,H,L,D]; minus infinity where nothing is visible (clause SCALE)."""
    found = q @ k.swapaxes(-1, -2) * np.float32(spec.scale)
    if spec.softcap is not None:
        found = np.float32(spec.softcap) * np.tanh(found / np.float32(spec.softcap))
    return np.where(visible, found, -np.inf)


def attend(spec: AttentionSpec, q: np.ndarray, live: Cache, at: np.ndarray, static: StaticLayer | None) -> np.ndarray:
    """Heads' outputs [B,T,Hq,D] for queries at positions `at`: one softmax over all keys (clauses STATIC, POSITION)."""
    q = q.swapaxes(1, 2)
    k, v = (np.repeat(part.swapaxes(1, 2), spec.group_size, axis=1) for part in (live.k, live.v))
    seen = scores(spec, q, k, visible_keys(spec, live, at))
    if static is None:
        return (softmax(seen) @ v).swapaxes(1, 2)
    lyra = list(spec.lyra_q_heads)
    group = [spec.lyra_kv_heads.index(head // spec.group_size) for head in lyra]
    static_k, static_v = (np.where(static.mask[:, None, :, None], part, 0) for part in (static.k, static.v))
    if spec.rope is not None:
        end = np.max(np.where(static.mask, static.positions + 1, 0), axis=1, keepdims=True, initial=0)
        back = end if spec.static.positions == "continue" else 0
        static_k = rotate(spec, static_k.swapaxes(1, 2), static.positions - back).swapaxes(1, 2)
    slots = static.mask.shape[1]
    both = np.concatenate([np.full((*q.shape[:3], slots), -np.inf, dtype=q.dtype), seen], axis=-1)
    both[:, lyra, :, :slots] = scores(spec, q[:, lyra], static_k[:, group], static.mask[:, None, None, :])
    weights = softmax(both)
    out = weights[..., slots:] @ v
    out[:, lyra] += weights[:, lyra, :, :slots] @ static_v[:, group]
    return out.swapaxes(1, 2)


def softmax(found: np.ndarray) -> np.ndarray:
    """Over the last axis; where nothing is visible all weights are 0 (clause MASKED)."""
    weights = np.exp(found - np.max(found, axis=-1, keepdims=True, initial=np.finfo(found.dtype).min))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)
