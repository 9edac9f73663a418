"""The ends of what the suite covers: rows, tokens, slots, heads and widths of a size that generated cases rarely have.

Clauses STATIC, SPLIT, BATCH and LIVE at every shape of `lyra.conformance.frames.LARGE`, a few cases each.
"""

from __future__ import annotations

import numpy as np
import pytest

from lyra.conformance.case import FLAVOURS, Case, Context
from lyra.conformance.frames import LARGE, Frame
from lyra.conformance.judge import Judge
from lyra.conformance.registry import prop
from lyra.conformance.session import current
from lyra.conformance.strategies import FAR, LIVE, POSITIONS
from lyra.spec.attention import AttentionSpec, QKNormSpec, RopeSpec, StaticSpec
from lyra.spec.split import HeadSplit


def large_cases() -> dict[str, Case]:
    """By name, the cases of this run: one of every shape in `ci`, more in `thorough`; none where a spec is given,
    whose sizes are its own.
    """
    session = current()
    if session.scope is not None:
        return {}
    rng = np.random.default_rng([session.seed, 23])
    count = max(1, session.profile.examples // 60)
    return {f"{name}-{i}": case_of(frame, rng) for name, frame in LARGE.items() for i in range(count)}


def case_of(frame: Frame, rng: np.random.Generator) -> Case:
    """A case of a frame, with a context: its numbers, heads and masks drawn."""
    query_heads, kv_heads = frame.heads
    spec = AttentionSpec(
        hidden_size=frame.hidden_size,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=frame.head_dim,
        scale=frame.head_dim**-0.5,
        softcap=2.0 if frame.softcap else None,
        bias=frame.bias,
        qk_norm=QKNormSpec() if frame.qk_norm else None,
        rope=RopeSpec(theta=float(rng.choice([1e4, 1e6])), factor=float(rng.choice([1.0, 8.0])))
        if frame.rope
        else None,
    )
    size = spec.group_size
    readers = rng.permutation(kv_heads)[: frame.groups]
    lyra = [int(kv * size + member) for kv in readers for member in rng.permutation(size)[: rng.integers(1, size + 1)]]
    tokens = sum(frame.calls)
    return Case(
        spec.replace(
            split=HeadSplit.from_q_heads(spec, lyra, share_kv=None),
            static=StaticSpec(live=rng.choice(LIVE), positions=rng.choice(POSITIONS)),
        ),
        calls=frame.calls,
        batch=frame.batch,
        context=Context(
            frame.context_tokens,
            batch=frame.context_batch,
            start=int(rng.integers(0, FAR - 3 * frame.context_tokens)),
            hidden=tuple(int(n) for n in rng.integers(0, frame.context_tokens // 4, frame.context_batch)),
            gaps=bool(rng.integers(2)),
        ),
        padding=tuple(int(n) for n in rng.integers(0, tokens, frame.batch)) if rng.integers(2) else (),
        padding_side=rng.choice(["left", "right"]),
        start=int(rng.integers(0, FAR - tokens)),
        flavour=rng.choice(list(FLAVOURS)),
        seed=int(rng.integers(2**32)),
    )


CASES = large_cases()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@prop(
    "TOLERANCE-1",
    "STATIC-2",
    "SPLIT-2",
    "BATCH-1",
    "LIVE-1",
    needs=("static",),
    profile="ci",
)
def test_large_shapes_equal_the_oracle(case: Case, judge: Judge) -> None:
    """8 rows, 64 tokens, 4,096 static slots, 64 heads, head_dim 8 to 256, hidden size 2,048: the oracle's values."""
    judge.oracle(case)
