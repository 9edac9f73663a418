"""The studies' language model in PyTorch: its operations, around the backend's own attention, training and timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy, embedding, linear, silu
from torch.nn.utils import clip_grad_norm_

from lyra.backends.torch_impl.cache import LiveCache, Room, crop
from lyra.backends.torch_impl.grouped import GroupedQueryAttention
from lyra.spec.attention import AttentionSpec
from lyra.speed.row import Work

from .language_model import LMSpec, Operations, logits
from .training import HELD, ROWS, Arrays, Recipe

Step = Callable[[Any, Any, Any], tuple[torch.Tensor, Any]]
"""weights, x, caches -> output, and the caches with what the step added."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own, over the last axis."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def attention(
    spec: AttentionSpec, weights: Mapping[str, torch.Tensor], x: torch.Tensor, cache: LiveCache | None
) -> tuple[torch.Tensor, LiveCache]:
    """The backend's module with these weights."""
    result: tuple[torch.Tensor, LiveCache] = functional_call(_module(spec), dict(weights), (x,), {"cache": cache})
    return result


@cache
def _module(spec: AttentionSpec) -> Any:
    return GroupedQueryAttention.from_spec(spec)


OPERATIONS = Operations(embedding, linear, rms_norm, silu, attention)


def arrays(weights: Arrays) -> dict[str, torch.Tensor]:
    """The weights as tensors."""
    return {name: torch.tensor(value) for name, value in weights.items()}


class TrainedModel:
    """A model and its torch.optim.AdamW, which decays matrices only."""

    def __init__(self, spec: LMSpec, recipe: Recipe, state: Arrays, done: int) -> None:
        self.spec, self.recipe = spec, recipe
        ordered = {name: state[name] for name in spec.weight_shapes()}  # norms are summed in this order
        self.parameters = {name: value.requires_grad_() for name, value in arrays(ordered).items()}
        matrices, vectors = ([p for p in self.parameters.values() if (p.ndim > 1) == wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.adam_eps)
        for name, parameter in self.parameters.items():
            _, mean, square = (torch.tensor(state[prefix + name]) for prefix in HELD)
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(done)), "exp_avg": mean, "exp_avg_sq": square
            }  # fmt: skip

    def step(self, tokens: np.ndarray, learning_rate: float) -> tuple[float, float]:
        """One step on windows [rows, window + 1]: the loss before it, and the gradient's norm before it is clipped."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss = self._loss(torch.as_tensor(tokens))
        loss.backward()
        norm = clip_grad_norm_(self.parameters.values(), self.recipe.clip)
        self.optimizer.step()
        return loss.item(), norm.item()

    @torch.inference_mode()
    def loss(self, tokens: np.ndarray) -> float:
        """Mean cross-entropy of windows [N, window + 1]."""
        return sum(self._loss(part).item() * len(part) for part in torch.as_tensor(tokens).split(ROWS)) / len(tokens)

    def state(self) -> dict[str, np.ndarray]:
        """The weights and both moments, by name behind one of HELD."""
        kept = {}
        for name, parameter in self.parameters.items():
            adam = self.optimizer.state[parameter]
            for prefix, part in zip(HELD, (parameter, adam["exp_avg"], adam["exp_avg_sq"]), strict=True):
                kept[prefix + name] = part.detach().numpy().copy()
        return kept

    def _loss(self, tokens: torch.Tensor) -> torch.Tensor:
        scores, _ = logits(OPERATIONS, self.spec, self.parameters, tokens[:, :-1])
        return cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())


def work(step: Step, weights: Arrays, x: np.ndarray, caches: Any) -> Work:
    """The step, run again and again."""
    parameters, given = arrays(weights), torch.tensor(x)

    def before() -> None:
        """Free what was written behind these caches, so that the next step writes there again."""
        for held in [caches] if isinstance(caches, LiveCache) else caches or []:
            assert held.room is not None
            held.room.taken = held.mask.shape[1]

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
