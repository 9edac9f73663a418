"""From a checked folder to Hugging Face's text model, and what transformers has to be told of multimodal ones."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from lyra.backends.checkpoint import Checkpoint
from lyra.spec.errors import CheckpointError, InputError
from lyra.spec.families import family
from lyra.spec.storage import BFLOAT16
from lyra.spec.text_file import read_json

from . import families


def text_options(name: str | os.PathLike[str], kind: str, **options: Any) -> dict[str, Any]:
    """What from_pretrained of a text model of a family has to be told of a multimodal checkpoint; nothing for text.

    `options` say where it is found, as `revision` does. Raises InputError for a model of another family.
    """
    config, known = AutoConfig.from_pretrained(name, **options), family(kind)
    if hasattr(config, "text_config") and config.model_type == known.outer_type:
        return {"config": config.text_config, "key_mapping": dict(families.family(kind).key_mapping)}
    if config.model_type != known.text_type:
        expected = " or ".join(map(repr, known.model_types))
        raise InputError(f"{name} holds a model of type {config.model_type!r}; expected {expected}")
    return {}


def save_as_text(model: PreTrainedModel) -> None:
    """Let the text model of a multimodal checkpoint be saved as such: transformers would undo the renaming."""
    model._weight_conversions = None


def load_module(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Hugging Face's model of a checked folder; of a multimodal one the text part. Raises CheckpointError.

    Its config and its weights are those of the checkpoint, and nothing else that lies in the folder.
    """
    known = families.of(checkpoint.spec)
    loaded: Any = known.causal_model.from_pretrained(
        None,
        config=known.config(checkpoint),
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


def generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """What the folder says of generation, or what follows from its config. Raises CheckpointError."""
    path = checkpoint.folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig.from_model_config(families.of(checkpoint.spec).config(checkpoint))
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
