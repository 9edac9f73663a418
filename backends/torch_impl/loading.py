"""From a checked folder to Hugging Face's text model, and what transformers has to be told of multimodal ones."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig

from lyra.backends.checkpoint import Checkpoint
from lyra.spec.attention import RopeSpec
from lyra.spec.errors import CheckpointError, InputError
from lyra.spec.storage import BFLOAT16
from lyra.spec.text_file import read_json

TEXT_MODEL = {
    r"^(language_model\.model|model\.language_model)\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Where multimodal checkpoints, old and new, keep the parts of the text model."""

NOT_TEXT = [r"vision_tower", r"multi_modal_projector"]
"""The rest of a multimodal checkpoint, which a text model does not miss."""


def text_options(name: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """What from_pretrained of a text model has to be told of a multimodal checkpoint; nothing for one of text.

    `options` say where it is found, as `revision` does. Raises InputError for a model that is no Gemma-3.
    """
    config = AutoConfig.from_pretrained(name, **options)
    if hasattr(config, "text_config") and config.model_type == "gemma3":
        return {"config": config.text_config, "key_mapping": TEXT_MODEL}
    if config.model_type != "gemma3_text":
        raise InputError(f"{name} holds a model of type {config.model_type!r}; expected 'gemma3_text' or 'gemma3'")
    return {}


def save_as_text(model: Gemma3ForCausalLM) -> None:
    """Let the text model of a multimodal checkpoint be saved as such: transformers would undo the renaming."""
    model._weight_conversions = None


def load_module(checkpoint: Checkpoint, dtype: torch.dtype) -> Gemma3ForCausalLM:
    """The Gemma3ForCausalLM of a checked folder; of a multimodal model the text part. Raises CheckpointError.

    Its config and its weights are those of the checkpoint, and nothing else that lies in the folder.
    """
    loaded: Any = Gemma3ForCausalLM.from_pretrained(
        None,
        config=text_config(checkpoint),
        state_dict={name: as_tensor(array) for name, array in checkpoint.arrays()},
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    module, report = loaded
    odd = {name: sorted(found) for name, found in report.items() if found}
    if odd:
        raise CheckpointError(f"{checkpoint.folder}: this transformers does not take its weights ({odd!r:.300})")
    module.name_or_path = module.config.name_or_path = str(checkpoint.folder)
    module.generation_config = generation_config(checkpoint)
    return module


def text_config(checkpoint: Checkpoint) -> Gemma3TextConfig:
    """The checked config as transformers knows it, every layer's kind and RoPE written out."""
    spec = checkpoint.spec
    kinds = {"global": "full_attention", "sliding": "sliding_attention"}
    layers = {"full_attention": spec.attention, "sliding_attention": spec.sliding}
    ropes = {kind: rope_table(layer.rope) for kind, layer in layers.items() if layer is not None and layer.rope}
    return Gemma3TextConfig(
        **dict(checkpoint.fields)
        | {
            "layer_types": [kinds[kind] for kind in spec.pattern],
            "rope_parameters": ropes,
        }
    )


def rope_table(rope: RopeSpec) -> dict[str, Any]:
    """One kind of layer's entry in a config's `rope_parameters`."""
    if rope.factor == 1:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}


def generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """What the folder says of generation, or what follows from its config. Raises CheckpointError."""
    path = checkpoint.folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig.from_model_config(text_config(checkpoint))
    try:
        return GenerationConfig(**read_json(path, refuse=CheckpointError, what="how to generate"))
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: transformers does not take it ({error})") from None


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The same values where they lie; torch does not know NumPy's bfloat16."""
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
