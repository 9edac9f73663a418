"""What `lyra gqa speed` and `perplexity` time: a layer's prefill and decode step, a model's decode step.

Each is a contestant of the benchmark, in the framework that it is told.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    return _decode(framework, spec, batch, tokens, lambda timing: timing.OPERATIONS.attention)


def repeated_decode(framework: str, spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """The step of `decode` with the keys and values of the cache repeated for every query head, as repeat_kv does."""
    return _decode(framework, spec, batch, tokens, lambda timing: timing.repeating_attention)


def model_decode(framework: str, spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """The same step of a whole language model, with random weights."""
    timing, sizes = _timing(framework), LMSpec.from_dict(spec)
    caches = [timing.full_cache(sizes.attention, batch, tokens) for _ in range(sizes.num_layers)]
    step = partial(logits, timing.OPERATIONS, sizes)
    work: Work = timing.work(step, initial_weights(sizes, 0), np.zeros((batch, 1), np.int32), caches)
    return work


def _decode(framework: str, spec: Mapping[str, Any], batch: int, tokens: int, attention: Any) -> Work:
    timing, layer = _timing(framework), AttentionSpec.from_dict(spec)
    x, cache = _random(batch, 1, layer.hidden_size), timing.full_cache(layer, batch, tokens)
    work: Work = timing.work(partial(attention(timing), layer), _weights(layer), x, cache)
    return work


def _timing(framework: str) -> Any:
    return import_module(f"{__package__}.{framework}_speed")


def _weights(layer: AttentionSpec) -> dict[str, np.ndarray]:
    return {name: _random(*shape) * layer.hidden_size**-0.5 for name, shape in layer.weight_shapes().items()}


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)
