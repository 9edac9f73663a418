"""What `lyra gqa speed` and `perplexity` time: a layer's prefill and decode step, a model's decode step."""

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


def work(what: str, framework: str, spec: Mapping[str, Any], batch: int, tokens: int) -> Work:
    """What a contestant of the benchmark does in its framework, with random weights.

    `what` is "prefill", a layer over so many tokens and an empty cache; "decode", a layer over one token more, which
    with those in the cache makes `tokens`; "repeated_decode", the same with the keys and values of the cache repeated
    for every query head, as repeat_kv does; or "model_decode", the step of a whole language model.
    """
    of = import_module(f"{__package__}.{framework}_lm")
    caches: Any = None
    if what == "model_decode":
        model = LMSpec.from_dict(spec)
        step = partial(logits, of.OPERATIONS, model)
        weights, x = initial_weights(model, 0), np.zeros((batch, 1), np.int32)
        caches = [of.full_cache(model.attention, batch, tokens) for _ in range(model.num_layers)]
    else:
        layer = AttentionSpec.from_dict(spec)
        step = partial(_repeated if what == "repeated_decode" else _plain, of, layer)
        weights = {name: _random(*shape) * layer.hidden_size**-0.5 for name, shape in layer.weight_shapes().items()}
        x = _random(batch, tokens if what == "prefill" else 1, layer.hidden_size)
        if what != "prefill":
            caches = of.full_cache(layer, batch, tokens)
    made: Work = of.work(step, weights, x, caches)
    return made


def _plain(of: Any, layer: AttentionSpec, weights: Any, x: Any, cache: Any) -> Any:
    return of.attention(layer, weights, x, cache)


def _repeated(of: Any, layer: AttentionSpec, weights: Any, x: Any, cache: Any) -> Any:
    wide = layer.replace(num_key_value_heads=layer.num_attention_heads)
    return of.attention(wide, weights, x, Repeating(cache, of.repeat, layer.group_size))


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


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)
