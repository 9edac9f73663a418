"""The attention core of the PyTorch backend where the suite's shapes do not lead: masks of queries taken in blocks."""

from __future__ import annotations

import pytest
import torch

from lyra.backends.torch_impl import partial
from lyra.backends.torch_impl.partial import Partial, finish, partial_attention

TOKENS = 10


def causal_attention() -> Partial:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, heads, TOKENS, 8, generator=generator) for heads in (3, 1, 1))
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None, None]
    return partial_attention(q, k[:, :, 0], v[:, :, 0], visible, scale=0.4)


@pytest.mark.parametrize("tokens_a_block", [1, 3, 7])
def test_queries_in_blocks_see_what_they_see_at_once(tokens_a_block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = finish(causal_attention())
    lengths: list[int] = []
    block = partial._block

    def noted(q: torch.Tensor, *rest: object) -> Partial:
        lengths.append(q.shape[-2])
        return block(q, *rest)

    monkeypatch.setattr(partial, "_block", noted)
    monkeypatch.setattr(partial, "SCORES_PER_BLOCK", tokens_a_block * 2 * 3 * TOKENS)
    torch.testing.assert_close(finish(causal_attention()), at_once)
    assert sum(lengths) == TOKENS
    assert max(lengths) == tokens_a_block


def test_autocast_stays_out() -> None:
    """Products in bfloat16 would be off by 2⁻⁹ of the values (clause DTYPE-2)."""
    plain = finish(causal_attention())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(finish(causal_attention()), plain)
