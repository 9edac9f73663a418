"""Reading a Gemma-3 checkpoint into Hugging Face's text model."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, Gemma3ForCausalLM

from lyra.spec.errors import InputError

TEXT_MODEL = {
    r"^(language_model\.model|model\.language_model)\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Where multimodal checkpoints, old and new, keep the parts of the text model."""

NOT_TEXT = [r"vision_tower", r"multi_modal_projector"]
"""The rest of a multimodal checkpoint, which a text model does not miss."""


class _TextOfMultimodal(Gemma3ForCausalLM):
    """The text model, told that the rest of a multimodal checkpoint is not missed."""

    _keys_to_ignore_on_load_unexpected = NOT_TEXT


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


def load_module(folder: str, dtype: torch.dtype) -> Gemma3ForCausalLM:
    """The Gemma3ForCausalLM of a folder; of a multimodal model the text part. Raises InputError for missing weights."""
    options = text_options(folder, local_files_only=True)
    loaded: Any = (_TextOfMultimodal if options else Gemma3ForCausalLM).from_pretrained(
        folder,
        **options,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    module, report = loaded
    if options:
        save_as_text(module)
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{folder}: the checkpoint lacks {len(missing)} weights, the first being {missing[:3]}; "
            f"it is incomplete or not a Gemma-3: download or convert it again"
        )
    return module
