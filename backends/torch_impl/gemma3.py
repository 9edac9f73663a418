"""The attention module that takes the place of Hugging Face's Gemma3Attention in a layer with a static context.

It borrows the original's submodules, so no parameter is copied, and gives the live cache all heads, so that every
cache type, beam search and assisted decoding keep working. The context lives in the module, never in the cache.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, apply_rotary_pos_emb

from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError

from . import visibility
from .heads import LyraHeads, lyra_heads, unfold
from .layer import add_static
from .partial import finish, partial_attention
from .static import PreparedStatic

ATTENTION_KINDS = ("sdpa", "eager")
"""Hugging Face's attention implementations whose masks say which key is seen."""


class LyraGemma3Attention(Gemma3Attention):
    """Gemma3Attention whose Lyra heads also attend to a static context. Clauses SPLIT, STATIC, LIVE.

    `original` gives its submodules, which both then share; `spec` is the layer's, with its split; `static` is the
    prepared context or None. The context's tensors are buffers: they follow `.to`, and stay out of the state dict.
    """

    static_k: torch.Tensor | None
    static_v: torch.Tensor | None
    static_visible: torch.Tensor | None
    lyra_queries: torch.Tensor
    lyra_groups: torch.Tensor
    lyra_chosen: torch.Tensor | None

    def __init__(self, original: Gemma3Attention, spec: AttentionSpec, static: PreparedStatic | None) -> None:
        with torch.device("meta"):
            super().__init__(original.config, original.layer_idx)
        for name, child in original.named_children():
            setattr(self, name, child)
        self.train(original.training)
        self.spec = spec
        weight = original.k_proj.weight
        lyra = lyra_heads(spec.split, spec.num_attention_heads, spec.num_key_value_heads, weight.device)
        k, v, visible = (None, None, None) if static is None else static[:3]
        buffers = {
            "static_k": None if k is None else k.to(weight),
            "static_v": None if v is None else v.to(weight),
            "static_visible": None if visible is None else visible.to(weight.device),
            "lyra_queries": lyra.queries,
            "lyra_groups": lyra.groups,
            "lyra_chosen": lyra.chosen,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def forward(  # type: ignore[override]  # the parent announces a third return value that it does not give
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [B,T,E] -> [B,T,E]; live tokens at the positions of `position_embeddings`, all heads alike."""
        if self.training and self.attention_dropout:
            raise InputError(
                f"attention_dropout={self.attention_dropout} while training: a layer with a static context has none; "
                f"set it to 0 in the config"
            )
        batch, tokens = hidden_states.shape[:2]
        self._check_batch(batch)
        shape = (batch, tokens, -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden_states).view(shape).transpose(1, 2))
        k = self.k_norm(self.k_proj(hidden_states).view(shape).transpose(1, 2))
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        offset: int | torch.Tensor = 0
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
            offset = past_key_values.get_seq_length(self.layer_idx) - tokens
        queries = q.unflatten(1, (k.shape[1], -1))
        seen = self._visible(attention_mask, tokens, k.shape[2], offset, k.device)
        total = partial_attention(queries, k, v, seen, self.scaling, self.spec.softcap)
        if self.static is not None:
            total = add_static(total, queries, self.static, self.lyra, self.scaling, self.spec.softcap)
        heads = unfold(finish(total)).flatten(2).to(hidden_states.dtype)
        return self.o_proj(heads), None

    @property
    def static(self) -> PreparedStatic | None:
        """The prepared context, or None."""
        if self.static_k is None or self.static_v is None:
            return None
        return PreparedStatic(self.static_k, self.static_v, self.static_visible)

    @property
    def lyra(self) -> LyraHeads:
        """Which heads go to Lyra."""
        return LyraHeads(self.lyra_queries, self.lyra_groups, self.lyra_chosen)

    def _visible(
        self, mask: torch.Tensor | None, tokens: int, keys: int, offset: int | torch.Tensor, device: torch.device
    ) -> torch.Tensor | None:
        live = self.spec.static.live
        if live == "causal" and mask is None and tokens == 1 and isinstance(offset, int) and keys == offset + 1:
            return None
        # The model's mask hides padding; without one every key is real. Slots of the cache stand in causal order.
        query_slots = torch.arange(tokens, device=device)[:, None] + offset
        key_slots = torch.arange(keys, device=device)[None, :]
        causal = (key_slots <= query_slots)[None] if mask is None else live_keys(mask)[..., :keys]
        own = (key_slots == query_slots)[None] if live == "self" else None
        return visibility.by_head(causal, own, self.lyra_queries, live)

    def _check_batch(self, batch: int) -> None:
        if self.static_k is not None and len(self.static_k) not in {1, batch}:
            raise InputError(
                f"layer {self.layer_idx}: the context holds {len(self.static_k)} rows and the call {batch}; "
                f"attach a context of one row (shared by all) or of {batch}"
            )


def live_keys(mask: torch.Tensor) -> torch.Tensor:
    """The visible keys of a model's mask [B,1,T,L], boolean or additive (0 where seen), as bool [B,T,L]."""
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}; expected [batch, 1, queries, keys]")
    return mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
