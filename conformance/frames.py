"""Frames: the shapes and structures that generated cases are drawn from.

A backend that compiles does so once per shape, so shapes come from a small pool, drawn once per run from the run's seed,
while everything else (which heads, eps, theta, scale, positions, masks, data) stays free in every case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lyra.spec.attention import AttentionSpec

HEADS = ((2, 1), (1, 1), (2, 2), (4, 1), (4, 2), (4, 4), (6, 3), (6, 2), (8, 1), (8, 4), (16, 8), (12, 4))
"""Query and KV heads: MHA, GQA and MQA, groups of 1, 2, 3, 4 and 8."""

HEAD_DIMS = (8, 16, 32, 64)
WIDTHS = (12, 32, 48, 64)
CALLS = ((4,), (1, 1, 1, 1), (3, 2), (1,), (7,), (5, 1, 1), (2, 6), (1, 9), (12,), (2, 2, 2, 1, 1), (17, 1), (33,))
CONTEXT_TOKENS = (3, 1, 0, 8, 17, 40)


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


SMALLEST = Frame((2, 1), 8, 12, 1, (4,), 1, 3, 1)


def make_frames(count: int, seed: int, spec: AttentionSpec | None = None) -> tuple[Frame, ...]:
    """A pool of frames, the smallest first (what shrinking moves towards). With `spec`, its sizes are kept.

    The pool's shapes are the same for every seed, so that a compile cache stays warm; the seed decides how they are
    combined only in the last quarter.
    """
    fixed = np.random.default_rng(20)
    fresh = np.random.default_rng([seed, 21])
    frames = [_fit(SMALLEST, spec)]
    while len(frames) < count:
        rng = fixed if len(frames) < max(2, count * 3 // 4) else fresh
        frames.append(_fit(_draw(rng, len(frames)), spec))
    return tuple(dict.fromkeys(frames))


def _draw(rng: np.random.Generator, index: int) -> Frame:
    heads = HEADS[index % len(HEADS)]
    batch = int(rng.choice([1, 2, 3]))
    return Frame(
        heads=heads,
        head_dim=int(rng.choice(HEAD_DIMS)),
        hidden_size=int(rng.choice(WIDTHS)),
        groups=int(rng.integers(1, heads[1] + 1)),
        calls=CALLS[index % len(CALLS) if index % 3 else int(rng.integers(len(CALLS)))],
        batch=batch,
        context_tokens=int(rng.choice(CONTEXT_TOKENS)),
        context_batch=int(rng.choice([1, batch])),
        qk_norm=bool(rng.random() < 0.85),
        rope=bool(rng.random() < 0.85),
        bias=bool(rng.random() < 0.2),
        softcap=bool(rng.random() < 0.2),
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
