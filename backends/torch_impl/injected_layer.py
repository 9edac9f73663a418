"""A decoder layer of Hugging Face's with a block between its halves, whatever its family.

PyTorch alone: in JAX a layer is Lyra's own and asks the call for a block. A family's class inherits from this one and
from Hugging Face's, and has its norms by their roles.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers.cache_utils import Cache

from lyra.spec.families import LayerNorms

from .block_cache import WatchedCache


class InjectedLayer:
    """What makes a decoder layer one with a block behind its self-attention. Made by `inject`, undone by `withdraw`."""

    norms: ClassVar[LayerNorms]
    self_attn: Any
    mlp: Any
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
        norms = self.norms
        cache = WatchedCache(past_key_values) if self.injected.spec.source == "own" else past_key_values
        attended, _ = self.self_attn(
            hidden_states=self._normed(norms.attention_in, hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            **kwargs,
        )
        h = hidden_states + self._normed(norms.attention_out, attended)
        h = self.injected(h, position_embeddings, attention_mask, cache)
        fed = self.mlp(self._normed(norms.feed_forward_in, h))
        return h + self._normed(norms.feed_forward_out, fed)

    def _normed(self, name: str | None, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = x if name is None else getattr(self, name)(x)
        return normed
