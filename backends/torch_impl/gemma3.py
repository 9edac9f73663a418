"""The attention module that takes the place of Hugging Face's Gemma3Attention in a layer with a static context.

It shares the original's submodules, so no parameter is copied but rows of scattered heads, and gives the live cache all
heads, so that every cache type, beam search and assisted decoding keep working. The context lives in the module, never
in the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn
from transformers import Gemma3TextConfig
from transformers.cache_utils import Cache
from transformers.models.gemma3.modeling_gemma3 import (
    ALL_ATTENTION_FUNCTIONS,
    Gemma3Attention,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from lyra.spec.attention import AttentionSpec, RopeSpec, StaticSpec
from lyra.spec.context import StaticContext
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from . import projections
from .attention_kinds import check_gives_weights, check_kind
from .attentions import attentions, show_slots
from .heads import LyraHeads, lyra_heads, unfold
from .layer import add_static
from .offload import device_of
from .partial import finish, partial_attention
from .rope import cos_sin, inverse_frequencies, rotate
from .static import PreparedStatic
from .visibility import visible_slots

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SHARED = ("q_proj", "o_proj", "q_norm", "k_norm")
"""The submodules that both streams and the original module share."""

OF_THE_MODULE = (
    "scaling", "attention_dropout", "is_causal",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
"""What the original module has now, whatever its config says, and its hooks, which belong to the place in the model:
transformers collects `output_attentions` by some that it registers once."""

TUNED = ("static_k", "static_v")
"""The parameters of a context that is tuned. They belong into its file, not into the model's."""


class LyraGemma3Attention(Gemma3Attention):
    """Gemma3Attention whose Lyra heads also attend to a static context. Clauses SPLIT, STATIC, LIVE.

    The key and value projections stand in two parts, so that each stream's can be tuned alone: `lyra_k_proj` and
    `lyra_v_proj` for the KV heads that Lyra heads read, shared ones too, `vanilla_k_proj` and `vanilla_v_proj` for the
    rest. A projection that is more than a linear layer (wrapped for LoRA, quantised, offloaded, split over devices)
    stays whole, as `k_proj` and `v_proj`. State dicts are those of Gemma3Attention, with `k_proj` and `v_proj`, either
    way. The context's tensors are buffers, its keys and values parameters while they are tuned: they follow `.to`, and
    stay out of the state dict.

    `split` is by default the half of the heads that `HeadSplit.half` names; `static` says what Lyra heads see of live
    tokens and where these sit. Raises SpecError for a sliding-window layer with Lyra heads and for a split that does
    not fit.
    """

    static_k: torch.Tensor | None
    static_v: torch.Tensor | None
    static_visible: torch.Tensor | None
    static_positions: torch.Tensor | None
    lyra_queries: torch.Tensor
    lyra_groups: torch.Tensor
    lyra_chosen: torch.Tensor | None
    kv_order: torch.Tensor | None

    def __init__(
        self,
        config: Gemma3TextConfig,
        layer_idx: int,
        *,
        split: HeadSplit | None = None,
        static: StaticSpec | None = None,
    ) -> None:
        super().__init__(config, layer_idx)
        spec = ModelSpec.from_hf_config(config.to_dict()).layer(layer_idx)
        split = HeadSplit.half(spec) if split is None else split
        self.spec: AttentionSpec = spec.replace(split=split, static=static or StaticSpec())
        self.static_group: ProcessGroup | None = None
        self.static_trainable = False
        self.given: StaticContext | None = None  # the whole context, of which static_k and static_v are this layer's
        self.shown: np.ndarray | None = None  # which of its slots, bool [S], static_k and static_v are of; None for all
        self._original: tuple[Gemma3Attention, ...] = ()  # in a tuple, so that it is no submodule
        self._cut(self.k_proj, self.v_proj)
        for name in ("static_k", "static_v", "static_visible", "static_positions"):
            self.register_buffer(name, None, persistent=False)
        self.register_state_dict_post_hook(_join_state)
        self.register_load_state_dict_pre_hook(_cut_state)

    @classmethod
    def around(cls, original: Gemma3Attention, spec: AttentionSpec) -> Self:
        """The module that stands in for `original`, whose weights it shares; `spec` is the layer's, with its split."""
        with torch.device("meta"):
            made = cls(original.config, original.layer_idx, split=HeadSplit.none())
        made.spec = spec  # of this process's heads only, where others have the rest (tensor parallel)
        made.load_weights_from_original(original)
        return made

    def load_weights_from_original(self, original: Gemma3Attention) -> None:
        """Take over the weights of `original`, such as `layer.self_attn`, bit for bit.

        They are shared, not copied: q_proj, o_proj, q_norm and k_norm are its modules, the parts of k_proj and v_proj
        views of its rows where a stream's heads stand side by side, copies otherwise.
        """
        if isinstance(original, LyraGemma3Attention):
            raise InputError("load_weights_from_original: this is a LyraGemma3Attention; give its to_original()")
        for name in (*SHARED, *OF_THE_MODULE):
            setattr(self, name, getattr(original, name))
        self._cut(original.k_proj, original.v_proj)
        self._original = (original,)
        self.train(original.training)

    def to_original(self) -> Gemma3Attention:
        """A Gemma3Attention with the weights that this module has now, bit for bit, and no context.

        It is the module that the weights were loaded from, if any, brought up to date: with this module's submodules,
        where q_proj, say, has been wrapped for LoRA since, and in k_proj and v_proj with the rows of their parts, where
        these have been tuned or moved. Otherwise it is a new one. Raises InputError where a part has been wrapped
        itself: merge the adapter first.
        """
        original = self._original[0] if self._original else self._new_original()
        if not self.whole:
            for name in projections.NAMES:
                projections.restore(getattr(original, name), self._parts(name), self.kv_order, self.head_dim)
        for name in (*SHARED, *projections.NAMES) if self.whole else SHARED:
            setattr(original, name, getattr(self, name))
        original.train(self.training)
        return original

    def attend_to(
        self,
        static: PreparedStatic | None,
        mode: StaticSpec,
        *,
        trainable: bool = False,
        mask: np.ndarray | None = None,
    ) -> None:
        """Put a prepared context, or none, in the place of the present one; `mask` [Bc,S] is that of all its slots.

        With `trainable` its keys have not been rotated yet; they and its values become parameters, in float32, and are
        rotated in every call (clauses STORED-2, GRAD).
        """
        self.given = None
        self.shown = None if mask is None or len(mask) > 1 or mask.all() else mask[0]
        device, dtype = device_of(self.k_norm), self.k_norm.weight.dtype
        self.spec = self.spec.replace(static=mode)
        self.static_trainable = trainable and static is not None
        k, v, visible, positions, self.static_group = static or (None,) * 5
        for name, value in zip(TUNED, (k, v), strict=True):
            delattr(self, name)
            if value is not None and trainable:
                self.register_parameter(name, nn.Parameter(value.to(device, torch.float32)))
            else:
                self.register_buffer(name, None if value is None else value.to(device, dtype), persistent=False)
        self.static_visible = None if visible is None else visible.to(device)
        self.static_positions = None if positions is None else positions.to(device)

    def forward(  # type: ignore[override]  # the parent announces a third return value that it does not give
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [B,T,E] -> [B,T,E]; live tokens at the positions of `position_embeddings`, all heads alike.

        With `output_attentions`, also what the heads look at, as in `look`; it changes nothing. Hugging Face's own
        attention runs where there is no context, and gives what it gives. Raises InputError for a call that the layer
        cannot serve.
        """
        batch, tokens = hidden_states.shape[:2]
        self._check_batch(batch)
        q, k, v = self._rotated(hidden_states, position_embeddings)
        offset: int | torch.Tensor = 0
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
            offset = past_key_values.get_seq_length(self.layer_idx) - tokens
        if self._is_plain(attention_mask, tokens, k.shape[2]):
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            dropout = self.attention_dropout if self.training else 0.0
            heads, weights = interface(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
            return self.o_proj(heads.reshape(batch, tokens, -1)), weights
        check_kind(self.config._attn_implementation)
        if asked := kwargs.get("output_attentions") or self.config.output_attentions:
            check_gives_weights(self.config._attn_implementation)
        if self.training and self.attention_dropout:
            raise InputError(
                f"attention_dropout={self.attention_dropout} while training: a layer with a static context has none; "
                f"set it to 0 in the config, before the model is made"
            )
        seen = self._visible(attention_mask, tokens, k.shape[2], offset, k.device)
        return self.o_proj(self.attend(q, k, v, seen)), self._weights(q, k, seen).to(q.dtype) if asked else None

    def look(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **others: object,
    ) -> torch.Tensor:
        """What the heads look at in a call without a cache: their softmax weights, float32 [B,Hq,T,S+T].

        The S slots of the context stand first. A head that does not read it has 0 there; so has a hidden slot, and a
        query that sees nothing has 0 everywhere.
        """
        q, k, _ = self._rotated(hidden_states, position_embeddings)
        seen = self._visible(attention_mask, q.shape[2], k.shape[2], 0, k.device)
        return self._weights(q, k, seen)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """Every head over the live keys, Lyra heads over the context too: q [B,Hq,T,D], k and v [B,Hkv,L,D], all
        rotated, to [B,T,Hq·D]. seen bool, broadcastable to [B,Hkv,R,T,L], or None where every live key is."""
        queries = q.unflatten(1, (k.shape[1], -1))
        total = partial_attention(queries, k, v, seen, self.scaling, self.spec.softcap)
        static = self.static
        if static is not None:
            total = add_static(total, queries, static, self.lyra, self.scaling, self.spec.softcap)
        return unfold(finish(total)).flatten(2).to(q.dtype)

    def extra_repr(self) -> str:
        """The Lyra heads and the size of the context, for print(model)."""
        slots = 0 if self.static_k is None else self.static_k.shape[2]
        return f"lyra_q_heads={list(self.spec.lyra_q_heads)}, context of {slots} tokens"

    @property
    def static(self) -> PreparedStatic | None:
        """The prepared context, or None."""
        k, v = self.static_k, self.static_v
        if k is None or v is None or self.static_positions is None:
            return None
        if self.static_trainable and self.spec.rope is not None:
            k = rotate(k, *(part[:, None] for part in self._turns(self.spec.rope, self.static_positions)))
        return PreparedStatic(k, v, self.static_visible, self.static_positions, self.static_group)

    @property
    def lyra(self) -> LyraHeads:
        """Which heads go to Lyra."""
        return LyraHeads(self.lyra_queries, self.lyra_groups, self.lyra_chosen)

    @property
    def whole(self) -> bool:
        """Whether k_proj and v_proj stand whole, being more than linear layers."""
        return "k_proj" in self._modules

    @property
    def lyra_kv_cache(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The static keys, rotated to where live tokens meet them, and values, [Bc,G,S,D] each, or None."""
        static = self.static
        return None if static is None else static[:2]

    @property
    def lyra_position_embeddings(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin [Bc,S,D], float32, by which the static keys are rotated, or None."""
        if self.static_positions is None or self.spec.rope is None:
            return None
        cos, sin = (torch.cat((half, half), dim=-1) for half in self._turns(self.spec.rope, self.static_positions))
        return cos, sin

    def weights(self, name: str) -> torch.Tensor:
        """A weight by its name in Gemma3Attention, such as "k_proj.weight"; of a wrapped projection the wrapped one."""
        module, _, kind = name.partition(".")
        if self.whole or module not in projections.NAMES:
            return getattr(getattr(self, module), kind)
        vanilla, lyra = (getattr(part, kind) for part in self._parts(module))
        return projections.join(vanilla, lyra, self.kv_order, self.head_dim, dim=0)

    def _rotated(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B,Hq,T,D], k and v [B,Hkv,T,D] of hidden_states [B,T,E], q and k normed and rotated.

        In the parent's order: tensor parallel ranks, some of which have the parent, must reduce gradients in step.
        """
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = self._project("k_proj", hidden_states).view(shape).transpose(1, 2)
        v = self._project("v_proj", hidden_states).view(shape).transpose(1, 2)
        return *apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), *position_embeddings), v

    def _weights(self, q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """What the heads look at, for `attend`'s q and k: float32 [B,Hq,T,S+L]."""
        if self.static_group is not None:
            raise InputError(
                f"layer {self.layer_idx}: the context's slots are spread over processes, none of which sees what a "
                f"head looks at; enable it without a group for that"
            )
        queries = q.unflatten(1, (k.shape[1], -1))
        found = attentions(queries, k, seen, self.static, self.lyra, self.scaling, self.spec.softcap)
        return found if self.shown is None else show_slots(found, self.shown)

    def _project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [B,T,E] through "k_proj" or "v_proj", [B,T,Hkv·D], heads in their original order."""
        if self.whole:
            return getattr(self, name)(x)
        # One of them may have no head, as where there is one KV head in all; a gradient, if an empty one, it must have.
        if len(self._streams) == 1 and not torch.is_grad_enabled():
            return getattr(self, f"{self._streams[0]}_{name}")(x)
        vanilla, lyra = self._parts(name)
        return projections.join(vanilla(x), lyra(x), self.kv_order, self.head_dim, dim=2)

    def _parts(self, name: str) -> tuple[nn.Module, nn.Module]:
        """The vanilla and the Lyra part of "k_proj" or "v_proj"."""
        return getattr(self, f"vanilla_{name}"), getattr(self, f"lyra_{name}")

    def _cut(self, k_proj: nn.Module, v_proj: nn.Module) -> None:
        heads = projections.streams(self.spec)
        self._streams = tuple(stream for stream, chosen in zip(heads._fields, heads, strict=True) if chosen)
        for name in projections.NAMES:
            for old in (name, f"vanilla_{name}", f"lyra_{name}"):
                self._modules.pop(old, None)
        if projections.is_plain(k_proj) and projections.is_plain(v_proj):
            for name, module in zip(projections.NAMES, (k_proj, v_proj), strict=True):
                for stream, chosen in zip(heads._fields, heads, strict=True):
                    setattr(self, f"{stream}_{name}", projections.cut(module, chosen, self.head_dim))
        else:
            self.k_proj, self.v_proj = k_proj, v_proj
        self._place_heads(heads.order)

    def _place_heads(self, order: torch.Tensor | None) -> None:
        """Buffers that say which heads are Lyra's, made on the CPU whatever device is being initialised on."""
        spec, device = self.spec, device_of(self.k_norm)
        lyra = lyra_heads(spec.split, spec.num_attention_heads, spec.num_key_value_heads, torch.device("cpu"))
        names = ("lyra_queries", "lyra_groups", "lyra_chosen", "kv_order")
        for name, value in zip(names, (*lyra, order), strict=True):
            self.register_buffer(name, None if value is None else value.to(device), persistent=False)

    def _new_original(self) -> Gemma3Attention:
        with torch.device("meta"):
            made = Gemma3Attention(self.config, self.layer_idx)
        for name in projections.NAMES:
            getattr(made, name).to_empty(device=self.k_norm.weight.device)
        return made

    def _turns(self, rope: RopeSpec, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cos_sin(positions, inverse_frequencies(rope, self.head_dim).to(positions.device))

    def _is_plain(self, mask: torch.Tensor | None, tokens: int, keys: int) -> bool:
        """Whether Hugging Face's own attention does: no context, and causal (clause IDENTITY).

        Without a mask it takes several queries behind other keys for the first ones.
        """
        aligned = mask is not None or tokens in (1, keys)
        return self.static_k is None and self.spec.static.live == "causal" and aligned

    def _visible(
        self, mask: torch.Tensor | None, tokens: int, keys: int, offset: int | torch.Tensor, device: torch.device
    ) -> torch.Tensor | None:
        live = self.spec.static.live
        if live == "causal" and mask is None and tokens == 1 and isinstance(offset, int) and keys == offset + 1:
            return None
        return visible_slots(live, self.lyra_queries, mask, tokens, keys, offset, device)

    def _check_batch(self, batch: int) -> None:
        if self.static_k is not None and batch % len(self.static_k):
            raise InputError(
                f"layer {self.layer_idx}: the context holds {len(self.static_k)} rows and the call {batch}; "
                f"attach a context of one row (shared by all), of {batch}, or of one row a prompt where each prompt "
                f"stands in several rows side by side (beams)"
            )


def _join_state(module: LyraGemma3Attention, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    for name in TUNED:
        state.pop(prefix + name, None)
    if not module.whole:
        projections.joined_state(state, prefix, module.kv_order, module.head_dim)


def _cut_state(module: LyraGemma3Attention, state: dict[str, Any], prefix: str, *_: object) -> None:
    if module.static_trainable:
        state |= {prefix + name: getattr(module, name).detach() for name in TUNED}
    if not module.whole:
        projections.cut_state(state, prefix, projections.streams(module.spec), module.head_dim)
