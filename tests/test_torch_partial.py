"""The attention core of the PyTorch backend where the suite's shapes do not lead: masks of queries taken in tiles."""

from __future__ import annotations

import pytest
import torch

from lyra.backends.torch_impl import partial
from lyra.backends.torch_impl.partial import Partial, finish, partial_attention

TOKENS = 10


def causal_inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, heads, TOKENS, 8, generator=generator) for heads in (3, 1, 1))
    return q, k[:, :, 0], v[:, :, 0], torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None, None]


def causal_attention() -> Partial:
    return partial_attention(*causal_inputs(), scale=0.4)


@pytest.mark.parametrize("tokens_a_tile", [1, 3, 7])
def test_queries_in_tiles_see_what_they_see_at_once(tokens_a_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = finish(causal_attention())
    lengths: list[int] = []
    keys: list[int] = []
    tile = partial._tile

    def noted(q: torch.Tensor, k: torch.Tensor, *rest: object) -> Partial:
        lengths.append(q.shape[-2])
        keys.append(k.shape[-2])
        return tile(q, k, *rest)

    monkeypatch.setattr(partial, "_tile", noted)
    monkeypatch.setattr(partial, "SCORES_PER_TILE", tokens_a_tile * 2 * 3 * TOKENS)
    torch.testing.assert_close(finish(causal_attention()), at_once)
    assert sum(lengths) == TOKENS
    assert max(lengths) == tokens_a_tile
    assert keys == [sum(lengths[: count + 1]) for count in range(len(lengths))]  # later ones no query of a tile sees


@pytest.mark.parametrize("seen", [slice(2, 5), slice(0, 0), slice(9, 10)])
def test_keys_at_either_end_that_nobody_sees_are_left_out(seen: slice, monkeypatch: pytest.MonkeyPatch) -> None:
    """What those hold is not even read: NaN there would come through a product with weights of 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, *shape, 8, generator=generator) for shape in ((2, TOKENS), (TOKENS,), (TOKENS,)))
    visible = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
    visible[:, seen] = True
    visible = visible[None, None, None]
    at_once = finish(partial_attention(q, k, v, visible, scale=0.4))
    monkeypatch.setattr(partial, "SCORES_PER_TILE", 3 * 2 * TOKENS)
    v = v.masked_fill(~visible[0, 0, 0, 0, :, None], torch.nan) if seen.stop else v
    torch.testing.assert_close(finish(partial_attention(q, k, v, visible, scale=0.4)), at_once)


@pytest.mark.parametrize("masked", [True, False])
def test_what_all_queries_see_alike_serves_every_tile(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = causal_inputs()
    visible = (torch.arange(TOKENS) % 3 > 0)[None, None, None, None] if masked else None
    at_once = finish(partial_attention(q, k, v, visible, scale=0.4))
    monkeypatch.setattr(partial, "SCORES_PER_TILE", 3 * 2 * 3 * TOKENS)
    torch.testing.assert_close(finish(partial_attention(q, k, v, visible, scale=0.4)), at_once)


@pytest.mark.usefixtures("unchecked")
def test_tiles_are_compiled_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which keys a tile sees is not asked in compiled code: an answer would end the graph."""
    at_once = finish(causal_attention())
    monkeypatch.setattr(partial, "SCORES_PER_TILE", 3 * 2 * 3 * TOKENS)
    q, k, v, visible = causal_inputs()
    compiled = torch.compile(partial_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(finish(compiled(q, k, v, visible, scale=0.4)), at_once)


def test_autocast_stays_out() -> None:
    """Products in bfloat16 would be off by 2⁻⁹ of the values (clause DTYPE-2)."""
    plain = finish(causal_attention())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(finish(causal_attention()), plain)
