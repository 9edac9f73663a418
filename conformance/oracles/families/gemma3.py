"""Hugging Face's Gemma-3 as an oracle."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3DecoderLayer,
    Gemma3RotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from lyra.spec.attention import AttentionSpec
from lyra.spec.families.gemma3 import GEMMA3

from .family import Family, rope_table

FULL, SLIDING = "full_attention", "sliding_attention"


def supports(spec: AttentionSpec) -> str | None:
    """Why Gemma-3's attention cannot express a spec, or None if it can."""
    if spec.qk_norm is None:
        return "qk_norm is None; Gemma3Attention always norms queries and keys"
    if spec.rope is None:
        return "rope is None; Gemma3Attention always rotates queries and keys"
    return None


def config(spec: AttentionSpec) -> Gemma3TextConfig:
    """The configuration of a one-layer Gemma-3 whose attention is `spec`."""
    assert spec.qk_norm is not None
    layer_type = FULL if spec.sliding_window is None else SLIDING
    made = Gemma3TextConfig(
        # The class asks for a width that the heads divide, though Gemma-3 has its own head_dim: set below.
        hidden_size=spec.num_attention_heads * spec.head_dim,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        num_hidden_layers=1,
        layer_types=[layer_type],
        rope_parameters={layer_type: rope_table(spec)},
        rms_norm_eps=spec.qk_norm.eps,
        # The field holds integers only; the exact scale is set on the module.
        query_pre_attn_scalar=max(1, round(spec.scale**-2)),
        attention_bias=spec.bias,
        sliding_window=spec.sliding_window,
        attn_logit_softcapping=spec.softcap,
    )
    made.hidden_size = spec.hidden_size
    return made


def cos_sin(rotary: Any, attention: Any, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [B,T,D] of positions [B,T], in the type of x."""
    cos, sin = rotary(x, positions, attention.layer_type)
    return cos, sin


def small() -> Gemma3TextConfig:
    """A Gemma-3 whose window is shorter than the texts."""
    return Gemma3TextConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=8,
        layer_types=[SLIDING, SLIDING, FULL] * 2,
        rope_parameters={
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
        },
    )


FAMILY = Family(
    title="Gemma3Attention",
    norms=GEMMA3.norms,
    supports=supports,
    config=config,
    attention=Gemma3Attention,
    rotary=Gemma3RotaryEmbedding,
    decoder_layer=Gemma3DecoderLayer,
    causal_model=Gemma3ForCausalLM,
    cos_sin=cos_sin,
    turn=apply_rotary_pos_emb,
    eager=eager_attention_forward,
    small=small,
)
