"""The studies' language model in PyTorch, on the backend's GroupedQueryAttention, and one step of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, silu

from lyra.backends.torch_impl.cache import LiveCache
from lyra.backends.torch_impl.grouped import GroupedQueryAttention

from .language_model import LMSpec
from .training import MOMENTS, Recipe

ROWS = 32
"""Windows that are evaluated at once."""


class GatedMLP(nn.Module):
    """x [B,T,E] -> down(silu(gate(x)) · up(x)) [B,T,E]. Source: Shazeer 2020, "GLU Variants"."""

    def __init__(self, spec: LMSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B,T,E] -> [B,T,E]."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each behind a norm and added to what comes in."""

    def __init__(self, spec: LMSpec) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)
        self.self_attn = GroupedQueryAttention.from_spec(spec.attention)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = GatedMLP(spec)

    def forward(self, x: torch.Tensor, cache: LiveCache | None) -> tuple[torch.Tensor, LiveCache]:
        """x [B,T,E] -> [B,T,E], and the cache with the call's tokens."""
        attended, cache = self.self_attn(self.input_layernorm(x), cache=cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class LanguageModel(nn.Module):
    """The model of `LMSpec`; weights carry the names of Hugging Face's LlamaModel."""

    def __init__(self, spec: LMSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.num_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, spec.norm_eps)

    def forward(
        self, tokens: torch.Tensor, caches: Sequence[LiveCache] | None = None
    ) -> tuple[torch.Tensor, list[LiveCache]]:
        """tokens int64 [B,T] -> logits [B,T,V], and every layer's cache with the call's tokens."""
        x, grown = self.embed_tokens(tokens), []
        for number, layer in enumerate(self.layers):
            x, cache = layer(x, None if caches is None else caches[number])
            grown.append(cache)
        return linear(self.norm(x), self.embed_tokens.weight), grown


class TrainedModel:
    """A Learner: the model and torch.optim.AdamW, which decays matrices only."""

    def __init__(
        self,
        spec: LMSpec,
        recipe: Recipe,
        weights: Mapping[str, np.ndarray],
        moments: Mapping[str, np.ndarray] | None,
        done: int,
    ) -> None:
        self.recipe, self.module = recipe, LanguageModel(spec)
        self.module.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=True)
        self.parameters = dict(self.module.named_parameters())
        matrices, vectors = ([p for p in self.parameters.values() if (p.ndim > 1) == wide] for wide in (True, False))
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.adam_eps)
        if done and moments is not None:
            for name, parameter in self.parameters.items():
                mean, square = (torch.tensor(moments[prefix + name]) for prefix in MOMENTS)
                step = torch.tensor(float(done))
                self.optimizer.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}

    def step(self, tokens: np.ndarray, learning_rate: float) -> tuple[float, float]:
        """One step of AdamW on windows [rows, window + 1]: the loss before it, and the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss = self._loss(torch.as_tensor(tokens))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.clip)
        self.optimizer.step()
        return loss.item(), norm.item()

    def loss(self, tokens: np.ndarray) -> float:
        """Mean cross-entropy of windows [N, window + 1]."""
        with torch.inference_mode():
            parts = torch.as_tensor(tokens).split(ROWS)
            return sum(self._loss(part).item() * len(part) for part in parts) / len(tokens)

    def weights(self) -> dict[str, np.ndarray]:
        """The weights, by name."""
        return {name: parameter.detach().numpy().copy() for name, parameter in self.parameters.items()}

    def moments(self) -> dict[str, np.ndarray]:
        """AdamW's moments, by name behind one of MOMENTS."""
        found = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state[parameter]
            for prefix, key in zip(MOMENTS, ("exp_avg", "exp_avg_sq"), strict=True):
                found[prefix + name] = state[key].numpy().copy()
        return found

    def _loss(self, tokens: torch.Tensor) -> torch.Tensor:
        logits, _ = self.module(tokens[:, :-1])
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
