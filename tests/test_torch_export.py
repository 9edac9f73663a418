"""torch.export with a context: one program for any number of rows and tokens, by named dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_gemma import CUT, left_padding, make_model, random_ids
from torch.export import Dim, export
from transformers import DynamicCache

from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.spec import HeadSplit
from lyra.spec.attention import Live

pytestmark = pytest.mark.usefixtures("one_thread", "unchecked")

ROWS, TOKENS, PAST = Dim("rows", min=1, max=64), Dim("tokens", min=2, max=4096), Dim("past", min=1, max=4096)


def enabled(kinds: Sequence[str], split: HeadSplit, live: Live = "causal") -> Any:
    """A tiny model with layers of these kinds and a context in the global ones."""
    model = make_model(num_hidden_layers=len(kinds), layer_types=[f"{kind}_attention" for kind in kinds])
    injector = GemmaInjector(model)
    injector.enable(injector.capture(random_ids(1, 20)), split, live=live)
    return model


class WithoutCache(torch.nn.Module):
    """Logits of padded rows."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


class Continued(torch.nn.Module):
    """Logits of tokens behind those that the one layer's keys and values [B,Hkv,P,D] are of."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache = DynamicCache(config=self.model.config)
        cache.update(k, v, 0)
        return self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def assert_exports(module: torch.nn.Module, example: dict[str, Any], shapes: dict[str, Any], *others: Any) -> None:
    """The program that one example gives is the module for inputs of other shapes too."""
    program = export(module, (), example, dynamic_shapes=shapes).module()
    for inputs in (example, *others):
        assert torch.equal(program(**inputs), module(**inputs))


def test_rows_and_tokens_are_named_dimensions() -> None:
    def padded(rows: int, tokens: int) -> dict[str, torch.Tensor]:
        mask = torch.tensor(left_padding(rows, tokens).astype(int))
        return {"ids": torch.tensor(random_ids(rows, tokens)), "mask": mask}

    module = WithoutCache(enabled(["sliding", "full"], CUT))
    shapes = {"ids": {0: ROWS, 1: TOKENS}, "mask": {0: ROWS, 1: TOKENS}}
    assert_exports(module, padded(2, 11), shapes, padded(3, 17), padded(1, 5))


@pytest.mark.parametrize(("tokens", "live"), [(1, "causal"), (5, "self")])
def test_so_are_the_tokens_of_a_cache(tokens: int, live: Live) -> None:
    def behind(rows: int, past: int, tokens: int) -> dict[str, torch.Tensor]:
        k, v = torch.randn(2, rows, 2, past, 16)
        return {"ids": torch.tensor(random_ids(rows, tokens)), "k": k, "v": v}

    module = Continued(enabled(["full"], HeadSplit((2, 3)), live))
    cached = {0: ROWS, 2: PAST}
    shapes = {"ids": {0: ROWS, 1: TOKENS} if tokens > 1 else {0: ROWS}, "k": cached, "v": cached}
    assert_exports(module, behind(2, 7, tokens), shapes, behind(3, 11, tokens if tokens == 1 else 6))
