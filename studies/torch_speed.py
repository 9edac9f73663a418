"""What `lyra gqa speed` and `perplexity` time in PyTorch: a layer's prefill and decode step, a model's decode step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lyra.backends.torch_impl.cache import LiveCache, Room, live_tokens
from lyra.backends.torch_impl.grouped import GroupedQueryAttention
from lyra.backends.torch_impl.heads import lyra_heads
from lyra.backends.torch_impl.layer import Call, attend, output, project, rope
from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .language_model import LMSpec
from .torch_lm import LanguageModel


def prefill(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """A layer over so many tokens and an empty cache."""
    layer = _layer(spec)
    x = _random(batch, tokens, layer.spec.hidden_size)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return layer(x)[0]

    return Work(run)


def decode(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """A layer over one token more, which with those in the cache makes `tokens`."""
    layer = _layer(spec)
    x, cache = _random(batch, 1, layer.spec.hidden_size), full_cache(layer.spec, batch, tokens)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return layer(x, cache=cache)[0]

    return Work(run, before=partial(_give_up, [cache]))


def repeated_decode(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """The step of `decode` with the keys and values of the cache repeated for every query head, as repeat_kv does."""
    layer = _layer(spec)
    own, weights = layer.spec, dict(layer.named_parameters())
    wide = own.replace(num_key_value_heads=own.num_attention_heads)
    times, heads = own.num_attention_heads // own.num_key_value_heads, own.num_attention_heads
    everyone = lyra_heads(None, heads, heads, torch.device("cpu"))
    x, cache = _random(batch, 1, own.hidden_size), full_cache(own, batch, tokens)
    call = Call(x, torch.full((batch, 1), tokens - 1), torch.ones(batch, 1, dtype=torch.bool), None, None)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        q, k, v = project(own, weights, call.x)
        q, k = rope(own, q, k, call.positions)
        live = cache.append(live_tokens(k, v, call.mask, call.positions))
        k, v = (part.repeat_interleave(times, dim=1) for part in (live.k, live.v))
        return output(weights, attend(wide, everyone, q, live._replace(k=k, v=v), call))

    return Work(run, before=partial(_give_up, [cache]))


def model_decode(spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """The same step of a whole language model, with random weights."""
    sizes = LMSpec.from_dict(spec)
    model = LanguageModel(sizes)
    caches = [full_cache(sizes.attention, batch, tokens) for _ in range(sizes.num_layers)]
    token = torch.zeros(batch, 1, dtype=torch.long)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return model(token, caches)[0]

    return Work(run, before=partial(_give_up, caches))


def full_cache(spec: AttentionSpec, batch: int, tokens: int) -> LiveCache:
    """A cache of random keys and values that has room for `tokens` and holds one less."""
    shape = (batch, spec.num_key_value_heads, tokens, spec.head_dim)
    mask, positions = torch.ones(batch, tokens, dtype=torch.bool), torch.arange(tokens).repeat(batch, 1)
    slots = LiveCache(_random(*shape), _random(*shape), mask, positions)
    return slots.crop(tokens - 1)._replace(room=Room(slots, tokens - 1))


def _give_up(caches: Sequence[LiveCache]) -> None:
    """Free what was written behind these caches, so that the next step writes there again."""
    for cache in caches:
        assert cache.room is not None
        cache.room.taken = cache.mask.shape[1]


def _layer(spec: Mapping[str, Any]) -> GroupedQueryAttention:
    """The module with random weights, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GroupedQueryAttention.from_spec(AttentionSpec.from_dict(spec))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
