"""Small layers that several tests of the spec share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from lyra.spec import AttentionSpec


def layer(query_heads: int = 8, kv_heads: int = 4, **changes: Any) -> AttentionSpec:
    fields: dict[str, Any] = {"hidden_size": 24, "head_dim": 6, "scale": 0.5}
    return AttentionSpec(num_attention_heads=query_heads, num_key_value_heads=kv_heads, **(fields | changes))


@st.composite
def head_counts(draw: st.DrawFn) -> tuple[int, int]:
    kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    return kv_heads * group, kv_heads
