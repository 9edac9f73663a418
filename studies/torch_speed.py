"""How the studies' steps are timed in PyTorch: on a cache that each step finds as long as the last one did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lyra.backends.torch_impl.cache import LiveCache, Room, crop
from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .torch_lm import OPERATIONS, arrays
from .training import Arrays

__all__ = ["OPERATIONS", "full_cache", "repeat", "work"]

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


def repeat(part: torch.Tensor, times: int) -> torch.Tensor:
    """Keys or values [B,Hkv,...], each head so many times."""
    return part.repeat_interleave(times, dim=1)
