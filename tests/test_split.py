"""HeadSplit: which heads it names, what it refuses, and what it says to do instead."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_layers import head_counts, layer

from lyra.spec import (
    HeadSplit,
    ModelSpec,
    SpecError,
)

QUICK = settings(max_examples=150, deadline=None, database=None)


@QUICK
@given(counts=head_counts(), data=st.data())
def test_a_split_divides_the_heads(counts: tuple[int, int], data: st.DataObject) -> None:
    spec = layer(*counts)
    heads = data.draw(st.sets(st.integers(0, spec.num_attention_heads - 1)))
    split = HeadSplit.from_q_heads(spec, heads, share_kv=None)
    group = spec.group_size
    assert split.lyra_q_heads == tuple(sorted(heads))
    assert sorted(split.lyra_q_heads + split.vanilla_q_heads) == list(range(spec.num_attention_heads))
    assert set(split.lyra_kv_heads) == {head // group for head in heads}
    assert set(split.lyra_kv_heads) | set(split.vanilla_kv_heads) == set(range(spec.num_key_value_heads))
    assert set(split.cut_kv_heads) == set(split.lyra_kv_heads) & set(split.vanilla_kv_heads)
    assert split.is_kv_aligned == (not split.cut_kv_heads) == (not split.share_kv)
    for kv_heads in (split.lyra_kv_heads, split.vanilla_kv_heads, split.cut_kv_heads):
        assert list(kv_heads) == sorted(kv_heads)


@QUICK
@given(counts=head_counts(), data=st.data())
def test_the_nearest_aligned_splits_lie_on_both_sides(counts: tuple[int, int], data: st.DataObject) -> None:
    spec = layer(*counts)
    heads = data.draw(st.sets(st.integers(0, spec.num_attention_heads - 1)))
    split = HeadSplit.from_q_heads(spec, heads, share_kv=None)
    fewer, more = split.nearest_aligned()
    assert set(fewer) <= set(heads) <= set(more)
    assert len(more) - len(fewer) == len(split.cut_kv_heads) * spec.group_size
    for one in (fewer, more):
        assert HeadSplit.from_q_heads(spec, one).is_kv_aligned
    if split.is_kv_aligned:
        assert fewer == more == split.lyra_q_heads


@QUICK
@given(counts=head_counts())
def test_named_splits(counts: tuple[int, int]) -> None:
    spec = layer(*counts)
    query_heads, kv_heads, group = *counts, spec.group_size
    assert HeadSplit.none().lyra_q_heads == ()
    assert HeadSplit.none().bind(spec).vanilla_q_heads == tuple(range(query_heads))
    everything = HeadSplit.all(spec)
    assert everything.lyra_q_heads == tuple(range(query_heads))
    assert everything.vanilla_kv_heads == ()
    for n in range(kv_heads + 1):
        last = HeadSplit.last_kv(spec, n)
        assert last.lyra_q_heads == tuple(range(query_heads - n * group, query_heads))
        assert last == HeadSplit.from_kv_heads(spec, range(kv_heads - n, kv_heads))
        assert last.is_kv_aligned
        assert not last.share_kv
    half = HeadSplit.half(spec)
    if kv_heads > 1:
        assert half == HeadSplit.last_kv(spec, kv_heads // 2)
    else:
        assert half.lyra_q_heads == tuple(range(query_heads - max(1, query_heads // 2), query_heads))


def test_the_reference_case_and_the_smallest_one() -> None:
    twelve = ModelSpec.preset("gemma-3-12b").attention
    split = HeadSplit.last_kv(twelve, 4)
    assert split.lyra_q_heads == tuple(range(8, 16))
    assert split.lyra_kv_heads == (4, 5, 6, 7)
    assert split == HeadSplit.half(twelve) == ModelSpec.preset("gemma-3-12b-lyra-8q4kv").attention.split
    small = ModelSpec.preset("gemma-3-270m").attention
    half = HeadSplit.half(small)
    assert half == HeadSplit((2, 3), share_kv=True)
    assert half.bind(small).cut_kv_heads == half.bind(small).lyra_kv_heads == (0,)


def test_equality_and_hash_are_those_of_what_a_split_says() -> None:
    split = HeadSplit((3, 2, 6))
    assert split.lyra_q_heads == (2, 3, 6)
    assert split == HeadSplit(lyra_q_heads=[6, 3, 2])
    assert HeadSplit((2, 3)).bind(layer()) == HeadSplit((2, 3))
    assert hash(HeadSplit((2, 3)).bind(layer())) == hash(HeadSplit((2, 3)))
    assert len({HeadSplit((2, 3)), HeadSplit((2, 3), share_kv=True), HeadSplit((2, 3)).bind(layer())}) == 2
    assert split != (2, 3, 6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HeadSplit((1, 1)), "query heads [1] are named twice"),
        (lambda: HeadSplit((8,)).bind(layer()), "no query heads [8]; the layer has heads 0 to 7"),
        (lambda: HeadSplit((-1,)).bind(layer()), "no query heads [-1]"),
        (lambda: HeadSplit((1,)).bind(layer()), "share_kv=True"),
        (lambda: HeadSplit((1, 2, 3)).bind(layer()), "KV head 0 is read by query heads [0, 1], of which only [1] go"),
        (lambda: HeadSplit((1, 2, 3)).bind(layer()), "nearest aligned split: (2, 3) or (0, 1, 2, 3)"),
        (lambda: HeadSplit.last_kv(layer(), 5), "5 KV heads asked for, the layer has 4"),
        (lambda: HeadSplit.last_q(layer(), 9), "9 query heads asked for, the layer has 8"),
        (lambda: HeadSplit.from_kv_heads(layer(), (0, 4)), "no KV heads [4]; the layer has heads 0 to 3"),
        (lambda: HeadSplit((0, 1)).lyra_kv_heads, "call split.bind(spec) first"),
        (lambda: HeadSplit(lyra_heads=(1,)), "lyra_heads"),
        (lambda: HeadSplit((1,), lyra_q_heads=(1,)), "given twice"),
        (lambda: HeadSplit((), False, 1, 1, 1), "takes at most 4 values"),
    ],
)
def test_what_is_no_split_is_refused_with_what_to_do(make: Any, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert words in str(caught.value)
