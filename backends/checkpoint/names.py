"""Hugging Face's names of a Gemma-3's weights, alone or in a multimodal model, in the files of every age."""

from __future__ import annotations

import re

DECODER = r"(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)?"
PARTS = (
    r"embed_tokens\.weight",
    r"norm\.weight",
    r"layers\.(?:0|[1-9]\d*)\.(?:self_attn|mlp)\.[a-z]+_proj\.(?:weight|bias)",
    r"layers\.(?:0|[1-9]\d*)\.(?:self_attn\.)?[a-z_]*(?:norm|layernorm)\.weight",
)
TEXT = re.compile(DECODER + "(" + "|".join(PARTS) + ")")
HEAD = re.compile(r"(?:language_model\.)?(lm_head\.(?:weight|bias))")
OTHER_PARTS = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*")
"""What a multimodal checkpoint has beside the text model."""


def text_name(name: str) -> str | None:
    """The name in a `Gemma3ForCausalLM` of a tensor of the text model; None for what is no such tensor's name."""
    if found := TEXT.fullmatch(name):
        return f"model.{found[1]}"
    found = HEAD.fullmatch(name)
    return None if found is None else found[1]
