"""What `lyra gqa speed` and `perplexity` time: a layer's prefill and decode step, a model's decode step.

Each is a contestant of the benchmark, in the framework that it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .language_model import LMSpec, initial_weights, logits


def prefill(framework: str, spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """A layer over so many tokens and an empty cache."""
    timing, layer = _timing(framework), AttentionSpec.from_dict(spec)
    step = partial(timing.OPERATIONS.attention, layer)
    work: Work = timing.work(step, _weights(layer), _random(batch, tokens, layer.hidden_size), None)
    return work


def decode(framework: str, spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """A layer over one token more, which with those in the cache makes `tokens`."""
    timing, layer = _timing(framework), AttentionSpec.from_dict(spec)
    return _step(timing, layer, batch, tokens, partial(timing.OPERATIONS.attention, layer))


def repeated_decode(framework: str, spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """The step of `decode` with the keys and values of the cache repeated for every query head, as repeat_kv does."""
    timing, layer = _timing(framework), AttentionSpec.from_dict(spec)
    wide = layer.replace(num_key_value_heads=layer.num_attention_heads)

    def step(weights: Any, x: Any, cache: Any) -> Any:
        return timing.OPERATIONS.attention(wide, weights, x, Repeating(cache, timing.repeat, layer.group_size))

    return _step(timing, layer, batch, tokens, step)


@dataclass(frozen=True)
class Repeating:
    """A cache whose keys and values are read once for each query head of their group."""

    cache: Any
    repeat: Callable[[Any, int], Any]
    times: int

    def append(self, new: Any) -> tuple[Any, Any]:
        """The live keys and values, repeated, and the cache with the new ones."""
        live, cache = self.cache.append(new)
        keys, values = (self.repeat(part, self.times) for part in (live.keys, live.values))
        return live._replace(keys=keys, values=values), cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def model_decode(framework: str, spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """The same step of a whole language model, with random weights."""
    timing, sizes = _timing(framework), LMSpec.from_dict(spec)
    caches = [timing.full_cache(sizes.attention, batch, tokens) for _ in range(sizes.num_layers)]
    step = partial(logits, timing.OPERATIONS, sizes)
    work: Work = timing.work(step, initial_weights(sizes, 0), np.zeros((batch, 1), np.int32), caches)
    return work


def _step(timing: Any, layer: AttentionSpec, batch: int, tokens: int, step: Any) -> Work:
    x, cache = _random(batch, 1, layer.hidden_size), timing.full_cache(layer, batch, tokens)
    work: Work = timing.work(step, _weights(layer), x, cache)
    return work


def _timing(framework: str) -> Any:
    return import_module(f"{__package__}.{framework}_speed")


def _weights(layer: AttentionSpec) -> dict[str, np.ndarray]:
    return {name: _random(*shape) * layer.hidden_size**-0.5 for name, shape in layer.weight_shapes().items()}


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)
