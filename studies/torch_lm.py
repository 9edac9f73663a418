"""The studies' language model in PyTorch: its operations, on the backend's GroupedQueryAttention, and its training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy, embedding, linear, silu
from torch.nn.utils import clip_grad_norm_

from lyra.backends.torch_impl.cache import LiveCache
from lyra.backends.torch_impl.grouped import GroupedQueryAttention
from lyra.spec.attention import AttentionSpec

from .language_model import LMSpec, Operations, logits
from .training import MOMENTS, ROWS, Arrays, Recipe

STATE = ("exp_avg", "exp_avg_sq")
"""What torch.optim.AdamW calls its moments."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own, over the last axis."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def attention(
    spec: AttentionSpec, weights: Mapping[str, torch.Tensor], x: torch.Tensor, cache: LiveCache | None
) -> tuple[torch.Tensor, LiveCache]:
    """The backend's module with these weights."""
    result: tuple[torch.Tensor, LiveCache] = functional_call(_module(spec), dict(weights), (x,), {"cache": cache})
    return result


OPERATIONS = Operations(embedding, linear, rms_norm, silu, attention)


def arrays(weights: Arrays) -> dict[str, torch.Tensor]:
    """The weights as tensors."""
    return {name: torch.tensor(value) for name, value in weights.items()}


class TrainedModel:
    """A Learner: torch.optim.AdamW, which decays matrices only."""

    def __init__(
        self,
        spec: LMSpec,
        recipe: Recipe,
        weights: Mapping[str, np.ndarray],
        moments: Mapping[str, np.ndarray],
        done: int,
    ) -> None:
        self.spec, self.recipe = spec, recipe
        ordered = {name: weights[name] for name in spec.weight_shapes()}  # norms are summed in this order
        self.parameters = {name: value.requires_grad_() for name, value in arrays(ordered).items()}
        matrices, vectors = ([p for p in self.parameters.values() if (p.ndim > 1) == wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.adam_eps)
        for name, parameter in self.parameters.items() if done else ():
            held = (torch.tensor(moments[prefix + name]) for prefix in MOMENTS)
            step = {"step": torch.tensor(float(done))}
            self.optimizer.state[parameter] = step | dict(zip(STATE, held, strict=True))

    def step(self, tokens: np.ndarray, learning_rate: float) -> tuple[float, float]:
        """One step of AdamW on windows [rows, window + 1]: the loss before it, and the gradient's norm."""
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

    def weights(self) -> dict[str, np.ndarray]:
        """The weights, by name."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self.parameters.items()}

    def moments(self) -> dict[str, np.ndarray]:
        """AdamW's moments, by name behind one of MOMENTS."""
        return {
            prefix + name: self.optimizer.state[parameter][key].numpy().copy()
            for prefix, key in zip(MOMENTS, STATE, strict=True)
            for name, parameter in self.parameters.items()
        }

    def _loss(self, tokens: torch.Tensor) -> torch.Tensor:
        scores, _ = logits(OPERATIONS, self.spec, self.parameters, tokens[:, :-1])
        return cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten())


@cache
def _module(spec: AttentionSpec) -> Any:
    return GroupedQueryAttention.from_spec(spec)
