"""Hugging Face's Gemma-3: its classes, its config, and Lyra's model of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3DecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from lyra.backends.checkpoint import Checkpoint
from lyra.spec.families.gemma3 import GEMMA3

from ..context_attention import ContextAttention
from ..injected_layer import InjectedLayer
from ..lyra_model import ContextModel
from .family import Family, Source, rope_table

KEY_MAPPING = {
    r"^(language_model\.model|model\.language_model)\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
KINDS = {"global": "full_attention", "sliding": "sliding_attention"}


class LyraGemma3Attention(ContextAttention, Gemma3Attention):
    """Gemma3Attention whose Lyra heads also attend to a static context. Clauses SPLIT, STATIC, LIVE.

    `LyraGemma3Attention(config, layer_idx, *, split=None, static=None)`; all else is in `ContextAttention`.
    """

    original = Gemma3Attention
    shared = ("q_proj", "o_proj", "q_norm", "k_norm")
    rotary = staticmethod(apply_rotary_pos_emb)
    eager = staticmethod(eager_attention_forward)


class InjectedDecoderLayer(InjectedLayer, Gemma3DecoderLayer):
    """A Gemma3DecoderLayer with a block between its halves."""

    norms = GEMMA3.norms


class LyraForCausalLM(ContextModel, Gemma3ForCausalLM):
    """A Gemma3ForCausalLM with GemmaInjector's methods, `capture` from text, and its tokenizer.

    Without a context it is Gemma3ForCausalLM, bit for bit, and it is saved as one whatever is enabled: plain
    transformers load what it saves. Of a multimodal checkpoint it takes the text model.
    """

    family = GEMMA3.name
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = ["vision_tower", "multi_modal_projector"]


# transformers goes by a class's name to choose the loss, to know what a pipeline serves and to save `architectures`.
LyraForCausalLM.__name__ = Gemma3ForCausalLM.__name__


def text_config(checkpoint: Checkpoint) -> Gemma3TextConfig:
    """The checked config as transformers knows it, every layer's kind and RoPE written out."""
    spec = checkpoint.spec
    layers = {"global": spec.attention, "sliding": spec.sliding}
    written = {
        "layer_types": [KINDS[kind] for kind in spec.pattern],
        "rope_parameters": {
            KINDS[kind]: rope_table(layer.rope) for kind, layer in layers.items() if layer is not None and layer.rope
        },
    }
    return Gemma3TextConfig(**dict(checkpoint.fields) | written)


def keys_and_values(attention: Any) -> tuple[Source, Source]:
    """k_norm has the heads in front already, v_proj has them side by side."""

    def by_head(flat: torch.Tensor) -> torch.Tensor:
        return flat.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    return Source(attention.k_norm, lambda keys: keys), Source(attention.v_proj, by_head)


def turn(
    text: Gemma3TextModel, like: torch.Tensor, positions: torch.Tensor, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin [B,S,D] of positions [B,S] in a layer, in the type of `like`."""
    cos, sin = text.rotary_emb(like, positions, text.config.layer_types[layer])
    return cos, sin


def frequencies(text: Gemma3TextModel) -> torch.Tensor | None:
    """The buffer of the global layers' frequencies [D/2]."""
    return getattr(text.rotary_emb, "full_attention_inv_freq", None)


FAMILY = Family(
    name=GEMMA3.name,
    causal_model=Gemma3ForCausalLM,
    holders="a Gemma3ForCausalLM or a Gemma3ForConditionalGeneration",
    text_model=Gemma3TextModel,
    config=text_config,
    key_mapping=KEY_MAPPING,
    attention=LyraGemma3Attention,
    decoder_layer=Gemma3DecoderLayer,
    injected_layer=InjectedDecoderLayer,
    keys_and_values=keys_and_values,
    turn=turn,
    frequencies=frequencies,
)
