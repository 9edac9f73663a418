"""What `lyra gqa speed` and `perplexity` time in PyTorch: a layer's prefill and decode step, a model's decode step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lyra.backends.torch_impl.cache import LiveCache
from lyra.backends.torch_impl.grouped import GroupedQueryAttention
from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .language_model import LMSpec
from .torch_lm import LanguageModel


def prefill(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """A layer over so many tokens and an empty cache."""
    layer = GroupedQueryAttention.from_spec(AttentionSpec.from_dict(spec))
    x = torch.randn(batch, tokens, layer.spec.hidden_size)

    @torch.inference_mode()
    def run() -> None:
        layer(x)

    return Work(run)


def decode(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """A layer over one token more, which with those in the cache makes `tokens`."""
    layer = GroupedQueryAttention.from_spec(AttentionSpec.from_dict(spec))
    x, cache = torch.randn(batch, 1, layer.spec.hidden_size), full_cache(layer.spec, batch, tokens - 1)

    @torch.inference_mode()
    def run() -> None:
        layer(x, cache=cache)

    return Work(run)


def model_decode(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """The same step of a whole language model, with random weights."""
    sizes = LMSpec.from_dict(spec)
    model = LanguageModel(sizes)
    caches = [full_cache(sizes.attention, batch, tokens - 1) for _ in range(sizes.num_layers)]
    token = torch.zeros(batch, 1, dtype=torch.long)

    @torch.inference_mode()
    def run() -> None:
        model(token, caches)

    return Work(run)


def full_cache(spec: AttentionSpec, batch: int, tokens: int) -> LiveCache:
    """A cache of random keys and values."""
    shape = (batch, spec.num_key_value_heads, tokens, spec.head_dim)
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    return LiveCache(torch.randn(shape), torch.randn(shape), mask, torch.arange(tokens).expand(batch, tokens))
