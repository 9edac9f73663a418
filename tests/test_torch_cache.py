"""The live cache grows in place, and yet no cache changes that somebody has (clause LIVE-4)."""

from __future__ import annotations

import numpy as np
import torch

from lyra.backends.torch_impl.cache import LiveCache, LiveKeys, crop, live_keys, reorder
from lyra.backends.torch_impl.grouped import GroupedQueryAttention

ROWS, KV_HEADS, HEAD_DIM = 2, 3, 4


def tokens(count: int, seed: int = 0) -> LiveKeys:
    """So many random tokens in each row."""
    k, v = torch.randn(2, ROWS, count, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    return live_keys(k, v, torch.ones(ROWS, count, dtype=torch.bool), torch.arange(count).repeat(ROWS, 1))


def appended(*parts: LiveKeys, to: LiveCache | None = None) -> LiveCache:
    """The cache of so many pieces, one behind the other."""
    cache = LiveCache(*parts[0]) if to is None else to
    for part in parts if to is not None else parts[1:]:
        _, cache = cache.append(part)
    return cache


def copied(cache: LiveCache) -> list[torch.Tensor]:
    return [part.clone() for part in cache[:4]]


def same(cache: LiveCache, parts: list[torch.Tensor]) -> bool:
    return all(torch.equal(own, part) for own, part in zip(cache[:4], parts, strict=True))


@torch.inference_mode()
def test_a_growing_cache_is_moved_when_it_doubles_only() -> None:
    cache, places, parts = appended(tokens(1)), [], [tokens(1)]
    for step in range(100):
        parts.append(tokens(1, seed=step))
        live, cache = cache.append(parts[-1])
        places.append(live.keys.data_ptr())
        assert same(cache, list(live))
    assert len(set(places)) == 4  # 16, 32, 64 and 128 slots
    for field, axis in (("keys", 2), ("values", 2), ("mask", 1), ("positions", 1)):
        assert torch.equal(getattr(cache, field), torch.cat([getattr(part, field) for part in parts], dim=axis))


@torch.inference_mode()
def test_what_is_continued_twice_has_two_ends() -> None:
    start = appended(tokens(3), tokens(2, seed=1))
    before = copied(start)
    first, other = appended(tokens(2, seed=2), to=start), appended(tokens(1, seed=3), to=start)
    assert first.keys.data_ptr() == start.keys.data_ptr() != other.keys.data_ptr()
    assert same(start, before)
    assert torch.equal(first.keys[:, :, 5:], tokens(2, seed=2).keys)
    assert torch.equal(other.keys[:, :, 5:], tokens(1, seed=3).keys)


@torch.inference_mode()
def test_going_on_from_a_shorter_one_leaves_the_longer_one() -> None:
    longer = appended(tokens(3), tokens(4, seed=1))
    before = copied(longer)
    again = appended(tokens(2, seed=2), to=crop(longer, 5))
    assert same(longer, before)
    assert torch.equal(again.keys, torch.cat((longer.keys[:, :, :5], tokens(2, seed=2).keys), dim=2))


def test_other_rows_are_another_cache() -> None:
    with torch.inference_mode():
        cache = appended(tokens(3), tokens(1, seed=1))
        turned = reorder(cache, np.array([1, 0]))
        end = appended(tokens(1, seed=2), to=cache)
        after = copied(end)
        turned.append(tokens(1, seed=3))
    assert same(end, after)


def test_what_autograd_has_read_is_not_written_to() -> None:
    torch.manual_seed(0)
    layer = GroupedQueryAttention(16, 4, 2)
    x = torch.randn(1, 4, 16, requires_grad=True)
    whole = torch.autograd.grad(layer(x)[0].square().sum(), x)[0]
    cache, outputs = None, []
    for piece in x.split(1, dim=1):
        output, cache = layer(piece, cache=cache)
        outputs.append(output)
    torch.testing.assert_close(torch.autograd.grad(torch.cat(outputs, 1).square().sum(), x)[0], whole)


def test_a_cache_made_for_inference_goes_on_outside_it() -> None:
    with torch.inference_mode():
        cache = appended(tokens(3), tokens(1, seed=1))
    before = copied(cache)
    with torch.no_grad():
        assert torch.equal(appended(tokens(1, seed=2), to=cache).keys[:, :, 4:], tokens(1, seed=2).keys)
    assert torch.equal(appended(tokens(1, seed=3), to=cache).keys[:, :, 4:], tokens(1, seed=3).keys)
    assert same(cache, before)
