"""The ends of what the suite covers: rows, tokens, slots, heads and widths of a size that generated cases rarely have.

Clauses STATIC, SPLIT, BATCH and LIVE at every shape of `lyra.conformance.case_sizes.LARGE`, a few cases each.
"""

from __future__ import annotations

import numpy as np

from lyra.conformance.case import Case
from lyra.conformance.case_sizes import LARGE, SMALLEST
from lyra.conformance.judge import Judge
from lyra.conformance.premises import CONTEXT, Premise
from lyra.conformance.registry import prop
from lyra.conformance.scope import Scope
from lyra.conformance.strategies import case_of
from lyra.spec.attention import AttentionSpec


def large_cases(scope: Scope) -> dict[str, Case]:
    """By name, the cases of a run: one of every shape in `ci`, more in `thorough`; none where a spec is given, whose
    sizes are its own.
    """
    if scope.spec is not None:
        return {}
    rng = np.random.default_rng([scope.seed, 23])
    count = max(1, scope.examples // 60)
    return {f"{name}-{i}": case_of(sizes, rng) for name, sizes in LARGE.items() for i in range(count)}


def large(spec: AttentionSpec, rows: int, tokens: int, slots: int) -> bool:
    """Whether some size is at an end of what the suite covers."""
    wide = spec.num_attention_heads >= 64 or spec.hidden_size >= 512 or spec.head_dim not in (16, 32, 64)
    return wide or rows >= 8 or tokens >= 64 or slots >= 4096


LARGE_SHAPE = Premise(
    "a shape at an end of what the suite covers",
    lambda problem: large(
        problem.spec, *problem.mask.shape, slots=0 if problem.static is None else problem.static.mask.shape[1]
    ),
    lambda case: case_of(SMALLEST.replace(head_dim=16), np.random.default_rng(case.seed)),
)


@prop(
    "TOLERANCE-1",
    "STATIC-2",
    "SPLIT-2",
    "BATCH-1",
    "LIVE-1",
    premise=(LARGE_SHAPE, CONTEXT),
    named=large_cases,
    needs=("static",),
    profile="ci",
)
def test_large_shapes_equal_the_oracle(case: Case, judge: Judge) -> None:
    """8 rows, 64 tokens, 4,096 static slots, 64 heads, head_dim 8 to 256, hidden size 2,048: the oracle's values."""
    judge.oracle(case)
