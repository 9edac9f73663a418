"""Property tests of head splits nobody has tried: copy this into your own tests and run it with pytest."""

from hypothesis import HealthCheck, given, settings

import lyra
from lyra.conformance import check_split, strategies

LAYER = lyra.ModelSpec.preset("gemma-3-12b").attention.replace(hidden_size=48, head_dim=16)  # 16 Q / 8 KV, narrow


def test_every_second_head() -> None:
    """One split of your own, in every mode, on every installed backend."""
    print(check_split(LAYER, lyra.HeadSplit(lyra_q_heads=tuple(range(0, 16, 2)), share_kv=True)))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.nested_given])
@given(split=strategies.head_splits(LAYER, kv_heads=4))
def test_any_split_that_reads_four_kv_heads(split: lyra.HeadSplit) -> None:
    """Splits that Hypothesis makes up: contiguous or not, whole groups or cut ones."""
    check_split(LAYER, split, backends=["torch"], examples=10)
