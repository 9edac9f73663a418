"""Blocks that are injected into Hugging Face's decoder layers, behind self-attention (clause SEQUENTIAL).

No hook reaches the place: self-attention's residual add makes a local variable, which the layer uses twice. So a layer
with a block changes its class to a subclass whose forward calls the library's own submodules one after the other, the
block among them. The layer remains the same object, with its parameters, names and hooks, and gets its class back when
the block leaves.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3RMSNorm

from lyra.spec.errors import InputError
from lyra.spec.inputs import StaticLayer, check_static
from lyra.spec.sequential import SequentialSpec

from .block_cache import WatchedCache, keep_live
from .gemma3 import LyraGemma3Attention
from .heads import LyraHeads, fold, lyra_heads, unfold
from .layer import add_static
from .offload import device_of
from .partial import finish, nothing, partial_attention
from .rope import rotate
from .static import PreparedStatic, prepare_static
from .visibility import visible_slots

LAYER_PARTS = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
}
"""The submodules of a Gemma3DecoderLayer: one with others is not the layer that this module takes apart."""

HOOKED = "_old_forward"
"""Where accelerate keeps the forward of a module that it has hooked, to call it between its own two halves."""


class Parts(NamedTuple):
    """The submodules of a block, by the names that its spec gives to their weights."""

    input_norm: Gemma3RMSNorm
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    q_norm: Gemma3RMSNorm
    k_norm: Gemma3RMSNorm
    o_proj: nn.Linear
    output_norm: Gemma3RMSNorm | None


def parts_of(layer: Gemma3DecoderLayer) -> Parts:
    """The submodules of a decoder layer that a block takes its first weights from. Clause SEQUENTIAL-7."""
    own: Any = layer.self_attn
    if isinstance(own, LyraGemma3Attention):
        own = own.to_original()  # whose key and value projections are in one piece
    return Parts(
        layer.input_layernorm, own.q_proj, own.k_proj, own.v_proj, own.q_norm, own.k_norm, own.o_proj,
        layer.post_attention_layernorm,
    )  # fmt: skip


class InjectedAttentionBlock(nn.Module):
    """An attention block behind a decoder layer's self-attention. Clause SEQUENTIAL.

    It begins with the weights of `layer`: `trainable` copies them into parameters of its own, named as in
    `spec.weight_shapes()`, beside the parameter `gate`; else it uses the layer's submodules, has no parameter, and the
    gate is a buffer that no state dict holds. Everything else comes from `spec`, whose RoPE and eps must be the
    layer's. `slot` is its place behind the model's layers in a cache, for live keys of its own.
    """

    gate: torch.Tensor
    lyra_queries: torch.Tensor
    lyra_groups: torch.Tensor
    lyra_chosen: torch.Tensor | None

    def __init__(
        self, layer: Gemma3DecoderLayer, spec: SequentialSpec, *, trainable: bool = False, slot: int | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.layer_idx = layer.layer_idx
        self.slot = slot
        attention = spec.attention
        parts = parts_of(layer)
        _check_eps(spec, parts)
        device = device_of(parts.o_proj)
        self._lent = None if trainable else parts  # a tuple, so that they are no submodules of the block
        gate = torch.tensor(float(spec.gate), device=device)
        if trainable:
            if any(value.is_meta for part in parts if part is not None for value in part.parameters()):
                raise InputError(f"layer {self.layer_idx}: its weights are kept elsewhere; bring them in to copy them")
            for name, part in parts._asdict().items():
                if name != "output_norm" or spec.output_norm:
                    self.add_module(name, copy.deepcopy(part))
            self.gate = nn.Parameter(gate)
        else:
            self.register_buffer("gate", gate, persistent=False)
        lyra = lyra_heads(attention.split, attention.num_attention_heads, attention.num_key_value_heads, device)
        for name, value in lyra._asdict().items():
            self.register_buffer(f"lyra_{name}", value, persistent=False)
        self.uses_live_keys = attention.static.live != "none" or len(attention.lyra_q_heads) < len(lyra.queries.ravel())

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | WatchedCache | None = None,
        external_past_key_values: PreparedStatic | None = None,
    ) -> torch.Tensor:
        """The residual stream h [B,T,E] to the block's output [B,T,E]; the rest is what the decoder layer was given.

        `past_key_values` is the model's cache, which the layer's own attention has updated already; with source "own"
        a WatchedCache that it went through. `external_past_key_values` is a context that `prepare` made, or None.
        Raises InputError for a context of other rows than the call's, and for a cache that does not fit.
        """
        spec, parts = self.spec, self.parts
        x = parts.input_norm(hidden_states)
        heads = self._attend(parts, x, position_embeddings, attention_mask, past_key_values, external_past_key_values)
        y = parts.o_proj(heads)
        if spec.output_norm and parts.output_norm is not None:
            y = parts.output_norm(y)
        return join(hidden_states, y, self.gate, spec.residual)

    @property
    def parts(self) -> Parts:
        """The submodules that it computes with: its own, or those of its layer."""
        if self._lent is not None:
            return self._lent
        own: dict[str, Any] = {name: getattr(self, name, None) for name in Parts._fields}
        return Parts(**own)

    @property
    def lyra(self) -> LyraHeads:
        """Which heads read the context."""
        return LyraHeads(self.lyra_queries, self.lyra_groups, self.lyra_chosen)

    def prepare(self, external: StaticLayer) -> PreparedStatic | None:
        """A context for `forward`: k normed and unrotated, in NumPy. None where nothing in it is visible.

        Raises InputError for one that does not fit the block.
        """
        if self.spec.source == "own":
            raise InputError("a block with source='own' reads the model's own cache and no context; leave it out")
        checked = check_static(self.spec.attention, external, len(external.k))
        prepared = prepare_static(self.spec.attention, checked)
        if prepared is None:
            return None
        last, visible = self.parts.o_proj, prepared.visible
        device, dtype = device_of(last), last.weight.dtype
        return prepared._replace(
            k=prepared.k.to(device, dtype),
            v=prepared.v.to(device, dtype),
            visible=None if visible is None else visible.to(device),
            positions=prepared.positions.to(device),
        )

    def _attend(
        self,
        parts: Parts,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Cache | WatchedCache | None,
        external: PreparedStatic | None,
    ) -> torch.Tensor:
        """The heads of the normed h, x [B,T,E], concatenated: [B,T,Hq·D]."""
        attention = self.spec.attention
        cos, sin = (table[:, :, None, : attention.head_dim // 2] for table in position_embeddings)
        q = self._rotated(parts.q_proj(x), parts.q_norm, cos, sin)
        queries = fold(q, attention.num_key_value_heads)
        total = nothing(queries)
        if self.uses_live_keys:
            k, v, offset = self._live(parts, x, cos, sin, cache)
            live = attention.static.live if attention.lyra_q_heads else "causal"
            seen = visible_slots(live, self.lyra_queries, mask, queries.shape[-2], k.shape[2], offset, k.device)
            total = partial_attention(queries, k, v, seen, attention.scale, attention.softcap)
        if external is not None:
            if len(x) % len(external.k):
                raise InputError(
                    f"layer {self.layer_idx}: the external context holds {len(external.k)} rows and the call {len(x)}; "
                    f"give a context of one row (shared by all) or of {len(x)}"
                )
            total = add_static(total, queries, external, self.lyra, attention.scale, attention.softcap)
        return unfold(finish(total)).flatten(2).to(x.dtype)

    def _live(
        self, parts: Parts, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, cache: Cache | WatchedCache | None
    ) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
        """Live keys and values [B,Hkv,L,D], and the place among them of the call's first token."""
        tokens = x.shape[1]
        if self.spec.source == "own":
            if not isinstance(cache, WatchedCache) or cache.k is None or cache.v is None:
                raise InputError(
                    "a block with source='own' needs the WatchedCache that its layer's own attention was given"
                )
            return cache.k, cache.v, cache.get_seq_length(self.layer_idx) - tokens
        k = self._rotated(parts.k_proj(x), parts.k_norm, cos, sin).transpose(1, 2)
        v = parts.v_proj(x).unflatten(-1, (-1, self.spec.attention.head_dim)).transpose(1, 2)
        if cache is None:
            return k, v, 0
        if self.slot is None:
            raise InputError(f"layer {self.layer_idx}: a block that sees live tokens needs a slot in the cache")
        k, v = keep_live(cache, self.slot, self.layer_idx, k, v)
        return k, v, cache.get_seq_length(self.slot) - tokens

    def _rotated(self, flat: torch.Tensor, norm: Gemma3RMSNorm, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Queries or keys [B,T,H·D] into heads, normed and turned to their positions: [B,T,H,D]."""
        return rotate(norm(flat.unflatten(-1, (-1, self.spec.attention.head_dim))), cos, sin)


class MemoryInjectionBlock(InjectedAttentionBlock):
    """An injected block that holds its context: buffers that follow `.to` and are in no state dict."""

    static_k: torch.Tensor | None
    static_v: torch.Tensor | None
    static_visible: torch.Tensor | None
    static_positions: torch.Tensor | None

    def __init__(
        self,
        layer: Gemma3DecoderLayer,
        spec: SequentialSpec,
        external: StaticLayer | None = None,
        *,
        trainable: bool = False,
        slot: int | None = None,
    ) -> None:
        super().__init__(layer, spec, trainable=trainable, slot=slot)
        memory = None if external is None else self.prepare(external)
        for name in ("k", "v", "visible", "positions"):
            self.register_buffer(f"static_{name}", None if memory is None else getattr(memory, name), persistent=False)
        self.static_group = None if memory is None else memory.group

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | WatchedCache | None = None,
        external_past_key_values: PreparedStatic | None = None,
    ) -> torch.Tensor:
        """As in the parent; the block's own context serves where none is given."""
        external = self.memory if external_past_key_values is None else external_past_key_values
        return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, external)

    @property
    def memory(self) -> PreparedStatic | None:
        """The prepared context, or None."""
        if self.static_k is None or self.static_v is None or self.static_positions is None:
            return None
        return PreparedStatic(
            self.static_k, self.static_v, self.static_visible, self.static_positions, self.static_group
        )


class InjectedDecoderLayer(Gemma3DecoderLayer):
    """A Gemma3DecoderLayer with a block between its halves. Made by `inject`, undone by `withdraw`."""

    injected: InjectedAttentionBlock

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


def check_place(layer: Gemma3DecoderLayer) -> None:
    """Refuse a layer that is not the library's, with or without a block of ours. Raises InputError."""
    names = {name for name, _ in layer.named_children()} - {"injected"}
    if type(layer) not in {Gemma3DecoderLayer, InjectedDecoderLayer} or names != LAYER_PARTS:
        raise InputError(
            f"layer {layer.layer_idx} is of the class {type(layer).__name__} with the parts {sorted(names)}; a block "
            f"goes into a plain Gemma3DecoderLayer with {sorted(LAYER_PARTS)}"
        )
    if "forward" in vars(layer) and HOOKED not in vars(layer):
        raise InputError(f"layer {layer.layer_idx} has a forward of its own, past which no block would be reached")


def inject(layer: Gemma3DecoderLayer, block: InjectedAttentionBlock) -> None:
    """Put a block into a decoder layer. Raises InputError for one that has a block, or that `check_place` refuses."""
    check_place(layer)
    if isinstance(layer, InjectedDecoderLayer):
        raise InputError(f"layer {layer.layer_idx} has a block; take it out first")
    layer.injected = block.train(layer.training)
    _become(layer, InjectedDecoderLayer)


def withdraw(layer: Gemma3DecoderLayer) -> None:
    """Take the block out again: the layer is Hugging Face's own, bit for bit."""
    _become(layer, Gemma3DecoderLayer)
    del layer.injected


def _become(layer: Gemma3DecoderLayer, kind: type[Gemma3DecoderLayer]) -> None:
    layer.__class__ = kind
    if HOOKED in vars(layer):
        setattr(layer, HOOKED, kind.forward.__get__(layer))


def _check_eps(spec: SequentialSpec, parts: Parts) -> None:
    """Refuse a spec whose norms are not those of the layer, which the block computes with. Raises InputError."""
    asked = (spec.norm_eps, None if spec.attention.qk_norm is None else spec.attention.qk_norm.eps)
    there = (parts.input_norm.eps, parts.q_norm.eps)
    if asked != there:
        raise InputError(f"a block with norm_eps and qk_norm.eps {asked} does not fit a layer whose norms have {there}")


def join(h: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, residual: bool) -> torch.Tensor:
    """(h if residual else 0) + gate · y, h and y [B,T,E], summed in float32 and rounded once to h's type.

    With the residual a gate of 0 gives h itself, whatever y is, except where the gate is being trained: then the sum is
    formed, so that a gradient reaches it. Clauses SEQUENTIAL-1, SEQUENTIAL-3.
    """
    change = gate.float() * y.float()
    if not residual:
        return change.to(h.dtype)
    opened = (h.float() + change).to(h.dtype)
    return opened if gate.requires_grad and torch.is_grad_enabled() else torch.where(gate == 0, h, opened)
