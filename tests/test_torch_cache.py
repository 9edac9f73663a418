"""The live cache grows in place, and yet no cache changes that somebody has (clause LIVE-4)."""

from __future__ import annotations

import torch

from lyra.backends.torch_impl.cache import LiveCache, live_tokens
from lyra.backends.torch_impl.grouped import GroupedQueryAttention

ROWS, KV_HEADS, HEAD_DIM = 2, 3, 4


def tokens(count: int, seed: int = 0) -> LiveCache:
    """So many random tokens in each row."""
    k, v = torch.randn(2, ROWS, count, KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    return live_tokens(k, v, torch.ones(ROWS, count, dtype=torch.bool), torch.arange(count).repeat(ROWS, 1))


def copied(cache: LiveCache) -> list[torch.Tensor]:
    return [part.clone() for part in cache[:4]]


def same(cache: LiveCache, parts: list[torch.Tensor]) -> bool:
    return all(torch.equal(own, part) for own, part in zip(cache[:4], parts, strict=True))


@torch.inference_mode()
def test_a_growing_cache_is_moved_when_it_doubles_only() -> None:
    cache, places, parts = tokens(1), [], [tokens(1)]
    for step in range(100):
        parts.append(tokens(1, seed=step))
        cache = cache.append(parts[-1])
        places.append(cache.k.data_ptr())
    assert len(set(places)) == 4  # 16, 32, 64 and 128 slots
    for field, axis in (("k", 2), ("v", 2), ("mask", 1), ("positions", 1)):
        assert torch.equal(getattr(cache, field), torch.cat([getattr(one, field) for one in parts], dim=axis))


@torch.inference_mode()
def test_what_is_continued_twice_has_two_ends() -> None:
    start = tokens(3).append(tokens(2, seed=1))
    before = copied(start)
    one, other = start.append(tokens(2, seed=2)), start.append(tokens(1, seed=3))
    assert one.k.data_ptr() == start.k.data_ptr() != other.k.data_ptr()
    assert same(start, before)
    assert torch.equal(one.k[:, :, 5:], tokens(2, seed=2).k)
    assert torch.equal(other.k[:, :, 5:], tokens(1, seed=3).k)


@torch.inference_mode()
def test_going_on_from_a_shorter_one_leaves_the_longer_one() -> None:
    longer = tokens(3).append(tokens(4, seed=1))
    before = copied(longer)
    again = longer.crop(5).append(tokens(2, seed=2))
    assert same(longer, before)
    assert torch.equal(again.k, torch.cat((longer.k[:, :, :5], tokens(2, seed=2).k), dim=2))


def test_other_rows_are_another_cache() -> None:
    with torch.inference_mode():
        cache = tokens(3).append(tokens(1, seed=1))
        turned = cache.reorder([1, 0])
        end = cache.append(tokens(1, seed=2))
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
        cache = tokens(3).append(tokens(1, seed=1))
    before = copied(cache)
    with torch.no_grad():
        assert torch.equal(cache.append(tokens(1, seed=2)).k[:, :, 4:], tokens(1, seed=2).k)
    assert torch.equal(cache.append(tokens(1, seed=3)).k[:, :, 4:], tokens(1, seed=3).k)
    assert same(cache, before)
