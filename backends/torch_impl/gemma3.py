"""What ties Lyra's attention to Hugging Face's Gemma-3: its attention class and its decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3DecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .block_cache import WatchedCache
from .context_attention import ContextAttention

LAYER_PARTS = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
}
"""The submodules of a Gemma3DecoderLayer: one with others is not the layer that `InjectedDecoderLayer` takes apart."""


class LyraGemma3Attention(ContextAttention, Gemma3Attention):
    """Gemma3Attention whose Lyra heads also attend to a static context. Clauses SPLIT, STATIC, LIVE.

    `LyraGemma3Attention(config, layer_idx, *, split=None, static=None)`; all else is in `ContextAttention`.
    """

    original = Gemma3Attention
    shared = ("q_proj", "o_proj", "q_norm", "k_norm")
    rotary = staticmethod(apply_rotary_pos_emb)
    eager = staticmethod(eager_attention_forward)


class InjectedDecoderLayer(Gemma3DecoderLayer):
    """A Gemma3DecoderLayer with a block between its halves. Made by `inject`, undone by `withdraw`."""

    injected: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Self-attention and its residual add, the block, then the feed-forward half: [B,T,E] -> [B,T,E]."""
        cache = WatchedCache(past_key_values) if self.injected.spec.source == "own" else past_key_values
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            **kwargs,
        )
        h = hidden_states + self.post_attention_layernorm(attended)
        h = self.injected(h, position_embeddings, attention_mask, cache)
        return h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))


def block_parts(layer: Gemma3DecoderLayer) -> dict[str, nn.Module]:
    """The submodules of a decoder layer that a block takes its first weights from, by the names of the block's.

    Clause SEQUENTIAL-7.
    """
    own: Any = layer.self_attn
    if isinstance(own, ContextAttention):
        own = own.to_original()  # whose key and value projections are in one piece
    names = ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")
    outer = {"input_norm": layer.input_layernorm, "output_norm": layer.post_attention_layernorm}
    return outer | {name: getattr(own, name) for name in names}
