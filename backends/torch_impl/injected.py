"""Blocks that are injected into Hugging Face's decoder layers, behind self-attention (clause SEQUENTIAL).

PyTorch alone: in JAX a block goes in with the call. What runs is `run_block`, as everywhere.

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

from lyra.spec.errors import InputError
from lyra.spec.inputs import StaticLayer, check_static
from lyra.spec.sequential import SequentialSpec

from . import families
from .block_cache import BlockCache, SharedCache, WatchedCache
from .context_attention import ContextAttention
from .head_buffers import HeadBuffers
from .injected_layer import InjectedLayer
from .layer import Call, Layer, Numbers, Parts, shape_of
from .offload import device_of
from .rope import inverse_frequencies
from .sequential import Block, run_block
from .static import StaticKV, place_static, prepare_static

HOOKED = "_old_forward"
"""Where accelerate keeps the forward of a module that it has hooked, to call it between its own two halves."""

MEMORY = ("static_k", "static_v", "static_visible", "static_positions")
"""The buffers of a block's context."""


class BlockParts(NamedTuple):
    """The submodules of a block, by the names that its spec gives to their weights; None for a norm it has not."""

    input_norm: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_norm: Any
    k_norm: Any
    o_proj: Any
    output_norm: Any


def block_parts(layer: Any) -> BlockParts:
    """The submodules of a decoder layer that a block takes its first weights from. Clause SEQUENTIAL-7."""
    own, norms = layer.self_attn, families.of_layer(layer).injected_layer.norms
    if isinstance(own, ContextAttention):
        own = own.to_original()  # whose key and value projections are in one piece
    found = {name: getattr(own, name, None) for name in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "o_proj")}
    outer = {"input_norm": norms.attention_in, "output_norm": norms.attention_out}
    return BlockParts(**found, **{ours: name and getattr(layer, name) for ours, name in outer.items()})


class InjectedAttentionBlock(HeadBuffers):
    """An attention block behind a decoder layer's self-attention. Clause SEQUENTIAL.

    It begins with the weights of `layer`: `trainable` copies them into parameters of its own, named as in
    `spec.weight_shapes()`, beside the parameter `gate`; else it uses the layer's submodules, has no parameter, and the
    gate is a buffer that no state dict holds. Everything else comes from `spec`, whose RoPE and eps must be the
    layer's. `slot` is its place behind the model's layers in a cache, for live keys of its own. `trace` is a dictionary
    that every call writes its stages to, by the names of `spec.trace_names()`, or None.
    """

    gate: torch.Tensor

    def __init__(self, layer: Any, spec: SequentialSpec, *, trainable: bool = False, slot: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.layer_idx = layer.self_attn.layer_idx
        self.slot = slot
        self.trace: dict[str, torch.Tensor] | None = None
        attention = spec.attention
        parts = block_parts(layer)
        _check_eps(spec, parts)
        device = device_of(parts.o_proj)
        self._lent = None if trainable else parts  # a tuple, so that they are no submodules of the block
        gate = torch.tensor(float(spec.gate), device=device)
        if trainable:
            held = {name: part for name, part in parts._asdict().items() if part is not None}
            if any(value.is_meta for part in held.values() for value in part.parameters()):
                raise InputError(f"layer {self.layer_idx}: its weights are kept elsewhere; bring them in to copy them")
            for name, part in held.items():
                if name != "output_norm" or spec.output_norm:
                    self.add_module(name, copy.deepcopy(part))
            self.gate = nn.Parameter(gate)
        else:
            self.register_buffer("gate", gate, persistent=False)
        self.place_heads(attention, device)
        sees = attention.static.sees
        self.uses_live_keys = sees.earlier or sees.own or self.lyra is None or not self.lyra.everyone

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | WatchedCache | None = None,
        external_past_key_values: StaticKV | None = None,
    ) -> torch.Tensor:
        """The residual stream h [B,T,E] to the block's output [B,T,E]; the rest is what the decoder layer was given.

        `past_key_values` is the model's cache, which the layer's own attention has updated already; with source "own"
        a WatchedCache that it went through. `external_past_key_values` is a context that `prepare` made, or None.
        Raises InputError for a context of other rows than the call's, and for a cache that does not fit.
        """
        external, half = external_past_key_values, self.spec.attention.head_dim // 2
        batch, tokens = hidden_states.shape[:2]
        if external is not None and batch % len(external.keys):
            raise InputError(
                f"layer {self.layer_idx}: the external context holds {len(external.keys)} rows and the call {batch}; "
                f"give a context of one row (shared by all) or of {batch}"
            )
        cache = self._cache(past_key_values, attention_mask, tokens)
        cos, sin = position_embeddings
        turn = cos.narrow(-1, 0, half), sin.narrow(-1, 0, half)
        call = Call(None, None, external, cache, turn=turn)
        output, _ = run_block(hidden_states, self.block, call, self.trace)
        return output

    @property
    def parts(self) -> BlockParts:
        """The submodules that it computes with: its own, or those of its layer."""
        if self._lent is not None:
            return self._lent
        return BlockParts(*(getattr(self, name, None) for name in BlockParts._fields))

    @property
    def block(self) -> Block:
        """What it computes with now: its submodules, whatever has been wrapped, and the numbers of its spec."""
        spec, parts = self.spec, self.parts
        attention = spec.attention
        makes_keys = self.uses_live_keys and spec.source == "external"
        k_proj, v_proj, k_norm = (parts.k_proj, parts.v_proj, parts.k_norm) if makes_keys else (None, None, None)
        layer = Layer(
            Parts(parts.q_proj, k_proj, v_proj, parts.o_proj, parts.q_norm, k_norm),
            Numbers(attention.scale, None, attention.softcap, None, None, self.rule, self.lyra),
            shape_of(attention),
        )
        return Block(parts.input_norm, layer, parts.output_norm if spec.output_norm else None, self.gate, spec.residual)

    def prepare(self, external: StaticLayer) -> StaticKV | None:
        """A context for `forward`: k normed and unrotated, in NumPy. None where nothing in it is visible.

        Raises InputError for one that does not fit the block.
        """
        attention = self.spec.attention
        if self.spec.source == "own":
            raise InputError("a block with source='own' reads the model's own cache and no context; leave it out")
        placed = place_static(attention, check_static(attention, external, len(external.k)))
        if placed is None:
            return None
        keys, values, visible, positions, group = prepare_static(placed, inverse_frequencies(attention))
        last = self.parts.o_proj
        device, dtype = device_of(last), last.weight.dtype
        visible = None if visible is None else visible.to(device)
        return StaticKV(keys.to(device, dtype), values.to(device, dtype), visible, positions.to(device), group)

    def _cache(
        self, cache: Cache | WatchedCache | None, mask: torch.Tensor | None, tokens: int
    ) -> BlockCache | SharedCache | None:
        """Where its live keys are; None where it sees none."""
        if not self.uses_live_keys:
            return None
        if self.spec.source == "own":
            return SharedCache(cache, self.layer_idx, mask, tokens)
        return BlockCache(cache, self.slot, self.layer_idx, mask)


class MemoryInjectionBlock(InjectedAttentionBlock):
    """An injected block that holds its context: buffers that follow `.to` and are in no state dict."""

    static_k: torch.Tensor | None
    static_v: torch.Tensor | None
    static_visible: torch.Tensor | None
    static_positions: torch.Tensor | None

    def __init__(
        self,
        layer: Any,
        spec: SequentialSpec,
        external: StaticLayer | None = None,
        *,
        trainable: bool = False,
        slot: int | None = None,
    ) -> None:
        super().__init__(layer, spec, trainable=trainable, slot=slot)
        memory = None if external is None else self.prepare(external)
        *arrays, group = memory or (None,) * 5
        self.static_group: Any = group
        for name, value in zip(MEMORY, arrays, strict=True):
            self.register_buffer(name, value, persistent=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | WatchedCache | None = None,
        external_past_key_values: StaticKV | None = None,
    ) -> torch.Tensor:
        """As in the parent; the block's own context serves where none is given."""
        external = self.memory if external_past_key_values is None else external_past_key_values
        return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, external)

    @property
    def memory(self) -> StaticKV | None:
        """The prepared context, or None."""
        if self.static_k is None or self.static_v is None or self.static_positions is None:
            return None
        return StaticKV(self.static_k, self.static_v, self.static_visible, self.static_positions, self.static_group)


def check_place(layer: Any) -> None:
    """Refuse a layer that is not the library's, with or without a block of ours. Raises InputError."""
    family = families.of_layer(layer)
    expected = {"self_attn", "mlp", *(name for name in family.injected_layer.norms if name is not None)}
    names, number = {name for name, _ in layer.named_children()} - {"injected"}, layer.self_attn.layer_idx
    if type(layer) not in {family.decoder_layer, family.injected_layer} or names != expected:
        raise InputError(
            f"layer {number} is of the class {type(layer).__name__} with the parts {sorted(names)}; a block "
            f"goes into a plain {family.decoder_layer.__name__} with {sorted(expected)}"
        )
    if "forward" in vars(layer) and HOOKED not in vars(layer):
        raise InputError(f"layer {number} has a forward of its own, past which no block would be reached")


def inject(layer: Any, block: InjectedAttentionBlock) -> None:
    """Put a block into a decoder layer. Raises InputError for one that has a block, or that `check_place` refuses."""
    check_place(layer)
    if isinstance(layer, InjectedLayer):
        raise InputError(f"layer {layer.self_attn.layer_idx} has a block; take it out first")
    layer.injected = block.train(layer.training)
    _become(layer, families.of_layer(layer).injected_layer)


def withdraw(layer: Any) -> None:
    """Take the block out again: the layer is Hugging Face's own, bit for bit."""
    _become(layer, families.of_layer(layer).decoder_layer)
    del layer.injected


def _become(layer: Any, kind: Any) -> None:
    layer.__class__ = kind
    if HOOKED in vars(layer):
        setattr(layer, HOOKED, kind.forward.__get__(layer))


def _check_eps(spec: SequentialSpec, parts: BlockParts) -> None:
    """Refuse a spec whose norms are not those of the layer, which the block computes with. Raises InputError."""
    asked = (spec.norm_eps, None if spec.attention.qk_norm is None else spec.attention.qk_norm.eps)
    there = (_eps(parts.input_norm), None if parts.q_norm is None else _eps(parts.q_norm))
    if asked != there:
        raise InputError(f"a block with norm_eps and qk_norm.eps {asked} does not fit a layer whose norms have {there}")


def _eps(norm: Any) -> Any:
    """The eps of a norm of Hugging Face's, which its classes call one or the other."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
