"""Frames: the shapes and structures that generated cases are drawn from.

A backend that compiles does so once per shape, so shapes come from a small pool, drawn once per run,
while everything else (which heads, eps, theta, scale, positions, masks, data) stays free in every case.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from lyra.spec.attention import AttentionSpec

HEADS = ((4, 2), (6, 2), (4, 4), (8, 1), (16, 8), (6, 3), (2, 2), (4, 1), (1, 1), (8, 4), (12, 4), (2, 1))
"""Query and KV heads: MHA, GQA and MQA, groups of 1, 2, 3, 4 and 8."""

SIZES = ((16, 32), (8, 12), (32, 48), (64, 64))
"""head_dim and hidden_size."""

CALLS = (
    (4, 1, 1),
    (1, 4),
    (4, 4, 1),
    (6,),
    (9, 1),
    (5, 1, 1, 1),
    (1, 9),
    (3, 2, 1),
    (17, 1),
    (2, 2, 2, 2),
    (33,),
    (64,),
)
CONTEXT_TOKENS = (9, 3, 40, 1, 0, 17)
BATCHES = (2, 1, 3)


@dataclass(frozen=True)
class Frame:
    """Shapes and structure of a case. `groups` is G, the number of KV heads that Lyra heads read."""

    heads: tuple[int, int]
    head_dim: int
    hidden_size: int
    groups: int
    calls: tuple[int, ...]
    batch: int
    context_tokens: int
    context_batch: int
    qk_norm: bool = True
    rope: bool = True
    bias: bool = False
    softcap: bool = False

    def replace(self, **changes: Any) -> Frame:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


SMALLEST = Frame((2, 1), 8, 12, 1, (3, 1), 1, 3, 1)


def make_frames(count: int, seed: int, spec: AttentionSpec | None = None) -> tuple[Frame, ...]:
    """A pool of frames, the smallest first (what shrinking moves towards). With `spec`, its sizes are kept.

    Three quarters of the pool are the same for every seed, so that a compile cache stays warm; the rest follow it.
    """
    fixed, fresh = np.random.default_rng(20), np.random.default_rng([seed, 21])
    frames = [SMALLEST]
    while len(frames) < count:
        frames.append(_draw(fixed if len(frames) < max(2, count * 3 // 4) else fresh, len(frames) - 1))
    return tuple(dict.fromkeys(_fit(frame, spec) for frame in frames))


def _draw(rng: np.random.Generator, index: int) -> Frame:
    """The index walks through every choice; the rest is drawn."""
    heads = HEADS[index % len(HEADS)]
    batch = BATCHES[index % len(BATCHES)]
    head_dim, hidden_size = SIZES[int(rng.integers(len(SIZES)))]
    plain = index < 3  # the first shapes, the only ones of a short run, have every stage and nothing else
    return Frame(
        heads=heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        groups=int(rng.integers(1, heads[1] + 1)),
        calls=CALLS[index % len(CALLS)],
        batch=batch,
        context_tokens=CONTEXT_TOKENS[index % len(CONTEXT_TOKENS)],
        context_batch=batch if index % 2 else 1,
        qk_norm=plain or bool(rng.random() < 0.85),
        rope=plain or bool(rng.random() < 0.85),
        bias=not plain and bool(rng.random() < 0.25),
        softcap=not plain and bool(rng.random() < 0.25),
    )


def _fit(frame: Frame, spec: AttentionSpec | None) -> Frame:
    """The frame with the sizes and the structure of `spec`."""
    if spec is None:
        return frame
    groups = len(spec.lyra_kv_heads) if spec.split is not None else min(frame.groups, spec.num_key_value_heads)
    return Frame(
        heads=(spec.num_attention_heads, spec.num_key_value_heads),
        head_dim=spec.head_dim,
        hidden_size=spec.hidden_size,
        groups=groups,
        calls=frame.calls,
        batch=frame.batch,
        context_tokens=frame.context_tokens,
        context_batch=frame.context_batch,
        qk_norm=spec.qk_norm is not None,
        rope=spec.rope is not None,
        bias=spec.bias,
        softcap=spec.softcap is not None,
    )
