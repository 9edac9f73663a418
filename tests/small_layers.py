"""Small layers that several tests share, and how near values of two implementations of one are."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from lyra.spec import AttentionSpec, HeadSplit, QKNormSpec, RopeSpec, StaticSpec


def layer(query_heads: int = 8, kv_heads: int = 4, **changes: Any) -> AttentionSpec:
    fields: dict[str, Any] = {"hidden_size": 24, "head_dim": 6, "scale": 0.5}
    return AttentionSpec(num_attention_heads=query_heads, num_key_value_heads=kv_heads, **(fields | changes))


CUT_LAYER = layer(
    4, 2, hidden_size=12, head_dim=8, scale=8**-0.5, split=HeadSplit(lyra_q_heads=(1, 2, 3), share_kv=True)
)
"""A layer whose split cuts a group, which shares its KV head."""


@st.composite
def head_counts(draw: st.DrawFn) -> tuple[int, int]:
    kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return kv_heads * group, kv_heads


@st.composite
def layers(draw: st.DrawFn, window: bool = True) -> AttentionSpec:
    query_heads, kv_heads = draw(head_counts())
    positive = st.floats(1e-30, 1e30, allow_nan=False, allow_infinity=False)
    spec = AttentionSpec(
        hidden_size=draw(st.integers(1, 10_000)),
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 512)),
        scale=draw(positive),
        softcap=draw(st.none() | positive),
        sliding_window=draw(st.none() | st.integers(1, 9999)) if window else None,
        bias=draw(st.booleans()),
        qk_norm=draw(st.none() | st.builds(QKNormSpec, eps=positive)),
        rope=draw(st.none() | st.builds(RopeSpec, theta=positive, factor=positive)),
        static=StaticSpec(
            live=draw(st.sampled_from(["causal", "self", "none"])),
            positions=draw(st.sampled_from(["continue", "overlay"])),
        ),
    )
    if spec.sliding_window is not None or draw(st.booleans()):
        return spec
    heads = draw(st.sets(st.integers(0, query_heads - 1)))
    return spec.replace(split=HeadSplit.from_q_heads(spec, heads, share_kv=None))


def assert_real_tokens_close(got: np.ndarray, want: np.ndarray, mask: np.ndarray, atol: float = 5e-6) -> None:
    """float32, finite everywhere, and close where the mask [B,T] is True."""
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[mask], want[mask], rtol=0, atol=atol)
