"""Reading a Gemma-3 checkpoint into Hugging Face's text model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, Gemma3ForCausalLM

from lyra.spec.errors import InputError

TEXT_MODEL = {
    r"^(language_model\.model|model\.language_model)\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Where multimodal checkpoints, old and new, keep the parts of the text model."""


class _TextOfMultimodal(Gemma3ForCausalLM):
    """The text model, told that the rest of a multimodal checkpoint is not missed."""

    _keys_to_ignore_on_load_unexpected = [r"vision_tower", r"multi_modal_projector"]  # noqa: RUF012


def load_module(folder: str, dtype: torch.dtype) -> Gemma3ForCausalLM:
    """The Gemma3ForCausalLM of a folder; of a multimodal model the text part. Raises InputError for missing weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    multimodal = hasattr(config, "text_config")
    loaded: Any = (_TextOfMultimodal if multimodal else Gemma3ForCausalLM).from_pretrained(
        folder,
        config=config.text_config if multimodal else config,
        key_mapping=TEXT_MODEL if multimodal else None,
        dtype=dtype,
        attn_implementation="sdpa",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    module, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"{folder}: the checkpoint lacks {len(missing)} weights, the first being {missing[:3]}; "
            f"it is incomplete or not a Gemma-3: download or convert it again"
        )
    return module
