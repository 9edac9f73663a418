"""Real weights and real activations: what enters the global layers of a checkpoint when it reads a text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError
from lyra.spec.families import family_of_config
from lyra.spec.model import ModelSpec
from lyra.spec.text_file import read_json

from . import families

__all__ = ["RealLayer", "load_model", "model_spec", "real_layers"]


@dataclass(frozen=True, eq=False)
class RealLayer:
    """One layer of a checkpoint and what it met in a text.

    weights: float32, Hugging Face's names and layout; x [1,T,E] float32, the hidden states entering self-attention
    (after the input norm); positions [1,T] int64, 0 .. T-1.
    """

    index: int
    spec: AttentionSpec
    weights: dict[str, np.ndarray]
    x: np.ndarray
    positions: np.ndarray


@lru_cache(maxsize=1)
def load_model(folder: str) -> PreTrainedModel:
    """The checkpoint of a local folder in Hugging Face's layout, float32, eager attention; the last one is kept.

    Raises FileNotFoundError for a folder without a model, SpecError for one of no known family, InputError for one that
    lacks some of its weights.
    """
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder!r} holds no config.json; expected a local folder in Hugging Face's layout")
    family = family_of_config(read_json(config, refuse=InputError))
    loaded: Any = families.family(family.name).causal_model.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
    )
    model, report = loaded
    if report["missing_keys"]:  # Hugging Face only warns, and fills them with random numbers
        raise InputError(f"{folder!r} lacks weights that a {family.title} has: {sorted(report['missing_keys'])[:5]}")
    model.eval()
    return model


def model_spec(model: PreTrainedModel) -> ModelSpec:
    """The spec of a loaded model, read from its own configuration. Raises SpecError."""
    return ModelSpec.from_hf_config(model.config.to_dict())


def real_layers(
    folder: str | os.PathLike[str], ids: Sequence[int], layers: Sequence[int] | None = None
) -> tuple[RealLayer, ...]:
    """Spec, weights and inputs of some layers (default: all global ones) for the text `ids`.

    Raises FileNotFoundError, InputError, SpecError.
    """
    model = load_model(os.fspath(folder))
    spec = model_spec(model)
    wanted = spec.global_layers if layers is None else tuple(layers)
    _check(spec, wanted, ids)
    attentions = {index: model.model.layers[index].self_attn for index in wanted}
    with torch.inference_mode(), _entering(attentions) as seen:
        model.model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    positions = np.arange(len(ids), dtype=np.int64)[None]
    return tuple(
        RealLayer(index, spec.layer(index), _weights(attentions[index]), seen[index], positions) for index in wanted
    )


@contextmanager
def _entering(attentions: dict[int, nn.Module]) -> Iterator[dict[int, np.ndarray]]:
    """Record the hidden states that enter these modules while the block runs."""
    seen: dict[int, np.ndarray] = {}

    def record(index: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
            seen[index] = kwargs["hidden_states"].numpy().copy()

        return attentions[index].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [record(index) for index in attentions]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _weights(attention: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().float().numpy().copy() for name, tensor in attention.state_dict().items()}


def _check(spec: ModelSpec, layers: Sequence[int], ids: Sequence[int]) -> None:
    outside = [index for index in layers if not 0 <= index < spec.num_hidden_layers]
    if outside:
        raise InputError(f"layers {outside} do not exist; the model has layers 0 to {spec.num_hidden_layers - 1}")
    if not ids:
        raise InputError("ids is empty; give at least one token id")
    unknown = [token for token in ids if not 0 <= token < spec.vocab_size]
    if unknown:
        raise InputError(f"ids {unknown[:5]} are no tokens; the vocabulary has 0 to {spec.vocab_size - 1}")
