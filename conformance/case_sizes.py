"""Case sizes: the shapes and structures that generated cases are drawn from.

A backend that compiles does so once per shape, so shapes come from a small pool, drawn once per run,
while everything else (which heads, eps, theta, scale, positions, masks, data) stays free in every case.

A pool of a dozen has small shapes only. A longer one, as `thorough` has, goes on to the ends of what the suite
covers (EXTREMES), one at a time, the other sizes as small as COST asks for. LARGE are the same ends at larger sizes,
each a few cases of its own (properties/test_shapes.py).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from lyra.spec.attention import AttentionSpec

HEADS = (
    (4, 2),
    (6, 2),
    (4, 4),
    (8, 1),
    (16, 8),
    (6, 3),
    (2, 2),
    (4, 1),
    (1, 1),
    (8, 4),
    (12, 2),
    (2, 1),
    (10, 2),
    (14, 2),
)
"""Query and KV heads: MHA, GQA and MQA. Which KV head a query head reads shows where there are two at least: GROUPS."""

WIDTHS = ((16, 32), (8, 12), (32, 48), (64, 64))
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

EXTREMES: tuple[dict[str, Any], ...] = (
    {"batch": 8},
    {"calls": (64,)},
    {"context_tokens": 4096},
    {"heads": (64, 64)},
    {"head_dim": 256},
    {"calls": (1,)},
    {"heads": (64, 8)},
    {"head_dim": 80},
    {"hidden_size": 2048},
    {"heads": (64, 1)},
    {"head_dim": 128},
    {"batch": 8, "context_batch": 8, "context_tokens": 300},
    {"calls": (60, 3, 1)},
    {"head_dim": 96},
    {"heads": (32, 16)},
    {"head_dim": 8, "heads": (64, 64)},
    {"calls": (31, 33), "context_tokens": 1000},
)
"""The ends of what the suite covers, and some shapes between them. Each pins some sizes of a case."""

FEWEST = 4
"""Sizes of the smallest pool, that of profile `smoke`."""

COST = 3_000_000
"""The highest cost of a case of a pool."""

MODEST: tuple[dict[str, Any], ...] = (
    {"batch": 1},
    {"hidden_size": 32},
    {"head_dim": 16},
    {"calls": (2, 1)},
    {"heads": (4, 2)},
    {"context_tokens": 9},
    {"head_dim": 8},
    {"heads": (2, 1)},
)
"""What a case above COST gives up, in this order, unless it is pinned."""


@dataclass(frozen=True)
class CaseSizes:
    """Shapes and structure of a case. `static_kv_heads` is Hs, the KV heads that Lyra heads read."""

    heads: tuple[int, int]
    head_dim: int
    hidden_size: int
    static_kv_heads: int
    calls: tuple[int, ...]
    batch: int
    context_tokens: int
    context_batch: int
    qk_norm: bool = True
    rope: bool = True
    bias: bool = False
    softcap: bool = False

    def replace(self, **changes: Any) -> CaseSizes:
        """A copy with some fields changed; those that depend on heads and batch follow them where they must."""
        found = dataclasses.replace(self, **changes)
        kv_heads, rows = min(found.static_kv_heads, found.heads[1]), min(found.context_batch, found.batch)
        return dataclasses.replace(found, static_kv_heads=kv_heads, context_batch=rows if rows == found.batch else 1)

    @property
    def cost(self) -> int:
        """Multiplications of one case: its projections, scores and averages of values."""
        tokens = sum(self.calls)
        projected = 2 * self.hidden_size * sum(self.heads)
        attended = 2 * self.heads[0] * (self.context_tokens + tokens)
        return self.batch * tokens * self.head_dim * (projected + attended)


LARGE: dict[str, CaseSizes] = {
    "8-rows": CaseSizes((8, 4), 32, 48, 2, (7, 1), 8, 40, 8),
    "64-tokens": CaseSizes((8, 2), 32, 48, 1, (64,), 2, 9, 1),
    "64-tokens-in-calls": CaseSizes((6, 3), 16, 32, 2, (60, 3, 1), 1, 17, 1),
    "4096-slots": CaseSizes((4, 2), 64, 64, 2, (2, 1), 2, 4096, 1),
    "4096-slots-by-row": CaseSizes((4, 1), 16, 32, 1, (3,), 3, 4096, 3),
    "64-by-64-heads": CaseSizes((64, 64), 16, 64, 33, (4,), 1, 40, 1),
    "64-by-8-heads": CaseSizes((64, 8), 16, 64, 5, (3, 1), 2, 40, 1),
    "64-by-1-heads": CaseSizes((64, 1), 16, 64, 1, (4,), 2, 40, 2, bias=True),
    "head-dim-256": CaseSizes((4, 1), 256, 640, 1, (5,), 1, 100, 1),
    "head-dim-128": CaseSizes((8, 4), 128, 96, 3, (4,), 2, 40, 1, softcap=True),
    "head-dim-96": CaseSizes((6, 2), 96, 48, 1, (4,), 1, 40, 1, rope=False),
    "head-dim-80": CaseSizes((8, 8), 80, 48, 6, (4,), 1, 40, 1, qk_norm=False),
    "head-dim-8": CaseSizes((16, 2), 8, 512, 2, (4,), 8, 300, 1),
    "5-million-scores": CaseSizes((64, 8), 8, 16, 8, (20,), 1, 4096, 1),
    "hidden-2048": CaseSizes((4, 2), 32, 2048, 1, (4,), 1, 40, 1),
}
"""Layers at the ends of what the suite covers, by name."""

GROUPS: dict[str, CaseSizes] = {
    "1-to-a-group": CaseSizes((5, 5), 2, 5, 3, (3,), 1, 2, 1),
    "2-to-a-group": CaseSizes((14, 7), 6, 7, 5, (2,), 4, 5, 4),
    "3-to-a-group": CaseSizes((9, 3), 5, 9, 2, (1,), 5, 4, 1, rope=False),
    "4-to-a-group": CaseSizes((24, 6), 4, 11, 4, (2,), 1, 6, 1),
    "5-to-a-group": CaseSizes((10, 2), 10, 13, 1, (3,), 1, 7, 1),
    "6-to-a-group": CaseSizes((12, 2), 1, 12, 2, (2,), 6, 8, 6, rope=False),
    "7-to-a-group": CaseSizes((14, 2), 14, 15, 2, (3,), 1, 11, 1, bias=True),
    "8-to-a-group": CaseSizes((16, 2), 6, 1, 1, (2,), 7, 13, 1, softcap=True),
}
"""Small layers with every group of 1 to 8 query heads, at sizes that no pool has: 2 to 7 KV heads, heads of
few elements and of odd numbers of pairs, odd widths, 4 to 7 rows, contexts of every small length.
"""

SMALLEST = CaseSizes((2, 1), 8, 12, 1, (3, 1), 1, 3, 1)


def make_sizes(count: int, seed: int, spec: AttentionSpec | None = None) -> tuple[CaseSizes, ...]:
    """A pool of case sizes, the smallest first (what shrinking moves towards). With `spec`, its sizes are kept.

    Three quarters of the pool are the same for every seed, so that a compile cache stays warm; the rest follow it.
    """
    fixed, fresh = np.random.default_rng(20), np.random.default_rng([seed, 21])
    pool = [SMALLEST]
    while len(pool) < count:
        index = len(pool) - 1
        sizes = _draw(fixed if len(pool) < max(2, count * 3 // 4) else fresh, index)
        wide = index >= len(HEADS) and spec is None
        pool.append(_pin(sizes, EXTREMES[index % len(EXTREMES)]) if wide else sizes)
    return tuple(dict.fromkeys(_fit(sizes, spec) for sizes in pool))


def _draw(rng: np.random.Generator, index: int) -> CaseSizes:
    """The index walks through every choice; the rest is drawn."""
    heads = HEADS[index % len(HEADS)]
    batch = BATCHES[index % len(BATCHES)]
    head_dim, hidden_size = WIDTHS[int(rng.integers(len(WIDTHS)))]
    plain = index < 3  # the first shapes, the only ones of a short run, have every stage and nothing else
    own = index % 3 == (0 if index // 3 % 2 else 2)  # a context for each of two or three rows: every other such case
    static_kv_heads = int(rng.integers(1, heads[1] + 1))
    return CaseSizes(
        heads=heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        static_kv_heads=min(heads[1], 1 + index) if plain else static_kv_heads,
        calls=CALLS[index % len(CALLS)],
        batch=batch,
        context_tokens=CONTEXT_TOKENS[index % len(CONTEXT_TOKENS)],
        context_batch=batch if own else 1,
        qk_norm=plain or bool(rng.random() < 0.85),
        rope=plain or bool(rng.random() < 0.85),
        bias=not plain and bool(rng.random() < 0.25),
        softcap=not plain and bool(rng.random() < 0.25),
    )


def _pin(sizes: CaseSizes, pinned: dict[str, Any]) -> CaseSizes:
    """The sizes with some of them pinned, the others no larger than COST allows."""
    sizes = sizes.replace(**pinned)
    for smaller in MODEST:
        if sizes.cost > COST and not smaller.keys() & pinned.keys():
            sizes = sizes.replace(**smaller)
    return sizes


def _fit(sizes: CaseSizes, spec: AttentionSpec | None) -> CaseSizes:
    """The sizes with those and the structure of `spec`."""
    if spec is None:
        return sizes
    most = min(sizes.static_kv_heads, spec.num_key_value_heads)
    static_kv_heads = len(spec.lyra_kv_heads) if spec.split is not None else most
    return CaseSizes(
        heads=(spec.num_attention_heads, spec.num_key_value_heads),
        head_dim=spec.head_dim,
        hidden_size=spec.hidden_size,
        static_kv_heads=static_kv_heads,
        calls=sizes.calls,
        batch=sizes.batch,
        context_tokens=sizes.context_tokens,
        context_batch=sizes.context_batch,
        qk_norm=spec.qk_norm is not None,
        rope=spec.rope is not None,
        bias=spec.bias,
        softcap=spec.softcap is not None,
    )
