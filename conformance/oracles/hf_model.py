"""A whole model as oracle: Hugging Face's, the attention of its global layers replaced by the float64 oracle.

Everything but these layers is unmodified Hugging Face code in float32, so values are compared with the one tolerance of
whole models, relative to the largest value (`lyra.conformance.tolerance.MODEL`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lyra.backends.protocol import CapturedLayer
from lyra.spec.attention import AttentionSpec, StaticSpec
from lyra.spec.families import DEFAULT
from lyra.spec.inputs import StaticLayer
from lyra.spec.model import ModelSpec
from lyra.spec.reference import reference
from lyra.spec.sequential import SequentialSpec
from lyra.spec.split import HeadSplit

from . import families
from .families.family import normed
from .hf_real import load_model, model_spec
from .hf_sequential import InjectedLayer


def save_small_model(folder: str | os.PathLike[str], seed: int = 0, family: str = DEFAULT) -> None:
    """Write a small random model in Hugging Face's layout; norm weights are random too: zeros would hide them."""
    generator = torch.Generator().manual_seed(seed)
    known = families.family(family)
    model = known.causal_model(known.small())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
            parameter.normal_(0.0, spread, generator=generator)
    model.save_pretrained(folder)


class ModelOracle:
    """Logits with and without a context, and what capturing must give."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Raises FileNotFoundError, InputError for a folder that holds no whole model."""
        self.module = load_model(os.fspath(folder))
        self.spec: ModelSpec = model_spec(self.module)

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """The plain model's logits, float32 [B,T,V], for ids [B,T]."""
        with torch.inference_mode():
            return self.module(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()

    def capture(self, ids: np.ndarray, layers: Sequence[int]) -> dict[int, CapturedLayer]:
        """What the unmodified layers' projections give for ids [1,S], in one go, keys normed (clause CAPTURE)."""
        seen: dict[tuple[int, str], torch.Tensor] = {}
        handles = []
        for layer in layers:
            attention = self.module.model.layers[layer].self_attn
            for part in ("k_proj", "v_proj"):

                def keep(
                    _module: nn.Module, _args: Any, out: torch.Tensor, key: tuple[int, str] = (layer, part)
                ) -> None:
                    seen[key] = out

                handles.append(getattr(attention, part).register_forward_hook(keep))
        try:
            self.logits(ids)
        finally:
            for handle in handles:
                handle.remove()
        captured = {}
        for layer in layers:
            k, v = (self._by_head(seen[layer, part]) for part in ("k_proj", "v_proj"))
            with torch.inference_mode():
                k = normed(self.module.model.layers[layer].self_attn, "k_norm", k)
            captured[layer] = CapturedLayer(k.numpy(), v.numpy())
        return captured

    def _by_head(self, flat: torch.Tensor) -> torch.Tensor:
        """[B,T,Hkv·D] to [B,Hkv,T,D]."""
        return flat.unflatten(-1, (self.spec.num_key_value_heads, -1)).transpose(1, 2)

    def logits_with(
        self,
        ids: np.ndarray,
        static: Mapping[int, StaticLayer],
        splits: Mapping[int, HeadSplit],
        mode: StaticSpec,
    ) -> np.ndarray:
        """Logits, float32 [B,T,V], with the oracle's own attention in every layer that has a split."""
        layers, attentions = self.module.model.layers, {}
        for index, split in splits.items():
            spec = self.spec.layer(index).replace(split=split, static=mode)
            attentions[layers[index], "self_attn"] = OracleAttention(layers[index].self_attn, spec, static.get(index))
        with replaced(attentions):
            return self.logits(ids)

    def logits_injected(
        self, ids: np.ndarray, static: Mapping[int, StaticLayer], blocks: Mapping[int, SequentialSpec]
    ) -> np.ndarray:
        """Logits, float32 [B,T,V], with the oracle's block behind self-attention in every layer of `blocks`."""
        layers = self.module.model.layers
        injected = {
            (layers, str(index)): InjectedLayer(layers[index], block, static.get(index), self.spec)
            for index, block in blocks.items()
        }
        with replaced(injected):
            return self.logits(ids)


@contextmanager
def replaced(modules: Mapping[tuple[nn.Module, str], nn.Module]) -> Iterator[None]:
    """Other modules in the place of a module's children, by parent and name, while the block runs."""
    originals = {place: getattr(*place) for place in modules}
    try:
        for place, module in modules.items():
            setattr(*place, module)
        yield
    finally:
        for place, original in originals.items():
            setattr(*place, original)


class OracleAttention(nn.Module):
    """The float64 oracle in the place of a layer's attention, for one call over all live tokens, without padding."""

    def __init__(self, original: nn.Module, spec: AttentionSpec, static: StaticLayer | None) -> None:
        super().__init__()
        self.weights = {name: tensor.detach().numpy() for name, tensor in original.state_dict().items()}
        self.spec = spec
        self.static = static

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """hidden_states [B,T,E] -> output [B,T,E] and no attention weights."""
        batch, tokens = hidden_states.shape[:2]
        positions = np.broadcast_to(np.arange(tokens), (batch, tokens))
        stages = reference(self.spec, self.weights, hidden_states.numpy(), positions=positions, static=self.static)
        return torch.from_numpy(stages["output"].value.astype(np.float32)), None
