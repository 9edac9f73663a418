"""How the studies' steps are timed in PyTorch: on a cache that each step finds as long as the last one did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from lyra.backends.torch_impl.cache import LiveCache, Room, crop, live_keys
from lyra.backends.torch_impl.layer import Call, attend_to, layer_of, numbers_of, output, project, rope, shape_of
from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .torch_lm import OPERATIONS, arrays
from .training import Arrays

__all__ = ["OPERATIONS", "full_cache", "repeating_attention", "work"]

Step = Callable[[Any, Any, Any], tuple[torch.Tensor, Any]]
"""weights, x, caches -> output, and the caches with what the step added."""


def work(step: Step, weights: Arrays, x: np.ndarray, caches: Any) -> Work:
    """The step, run again and again."""
    parameters, given = arrays(weights), torch.tensor(x)

    def before() -> None:
        """Free what was written behind these caches, so that the next step writes there again."""
        for cache in [caches] if isinstance(caches, LiveCache) else caches or []:
            assert cache.room is not None
            cache.room.taken = cache.mask.shape[1]

    return Work(torch.inference_mode()(lambda: step(parameters, given, caches)[0]), before)


def full_cache(spec: AttentionSpec, batch: int, tokens: int) -> LiveCache:
    """A cache of random keys and values that has room for `tokens` and holds one less."""
    shape = (2, batch, spec.num_key_value_heads, tokens, spec.head_dim)
    keys, values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask, positions = torch.ones(batch, tokens, dtype=torch.bool), torch.arange(tokens).repeat(batch, 1)
    slots = LiveCache(keys, values, mask, positions)
    return crop(slots, tokens - 1)._replace(room=Room(slots, tokens - 1))


def repeating_attention(
    spec: AttentionSpec, weights: Mapping[str, torch.Tensor], x: torch.Tensor, cache: LiveCache
) -> tuple[torch.Tensor, LiveCache]:
    """A step whose keys and values are repeated for every query head before it attends."""
    batch, layer = len(x), layer_of(weights, numbers_of(spec), shape_of(spec))
    wide, times = layer._replace(shape=layer.shape._replace(kv_heads=layer.shape.query_heads)), spec.group_size
    positions, mask = torch.full((batch, 1), cache.mask.shape[1]), torch.ones(batch, 1, dtype=torch.bool)
    call = Call(positions, mask, None, cache)
    q, k, v = project(x, layer)
    q, k = rope(q, k, layer, call)
    assert k is not None
    assert v is not None
    live, after = cache.append(live_keys(k, v, mask, positions))
    keys, values = (part.repeat_interleave(times, dim=1) for part in (live.keys, live.values))
    return output(attend_to(q, live._replace(keys=keys, values=values), wide, call), layer), after
