"""Hugging Face's attention as an oracle for any head split.

Every number here is made by unmodified Hugging Face code: the layer's own projections and norms, its rotary embedding,
`apply_rotary_pos_emb`, `eager_attention_forward`. This module only composes: it says which head meets which keys, at
which positions and under which mask, literally as the clauses do (live tokens of the Lyra stream move to P + t; no
key is moved instead).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lyra.backends.protocol import Result
from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError
from lyra.spec.inputs import CallInputs, StaticLayer, check_call

from .families.family import normed
from .hf_modules import ModuleCache, Modules, supports

__all__ = ["HuggingFaceAttention", "HuggingFaceOracle", "supports"]

HIDDEN = torch.finfo(torch.float32).min
"""What Hugging Face adds to the score of a hidden key."""


class HuggingFaceOracle:
    """Hugging Face's layers in the shape of a backend: `lyra.conformance.oracles.hf:HuggingFaceOracle`."""

    name = "huggingface"
    capabilities = frozenset({"static"})

    def __init__(self) -> None:
        self._modules = ModuleCache()

    def supports(self, spec: AttentionSpec) -> str | None:
        """Why a spec is out of reach, or None."""
        return supports(spec)

    def attention(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> HuggingFaceAttention:
        """The layer, composed per stream. Raises InputError for weights that do not fit, SpecError out of reach."""
        return HuggingFaceAttention(spec, self._modules.get(spec, weights))

    @torch.inference_mode()
    def plain(
        self,
        spec: AttentionSpec,
        weights: Mapping[str, np.ndarray],
        x: np.ndarray,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """The forward of Hugging Face's attention, under its own mask; the split is ignored (clause IDENTITY).

        x [B,T,E] float32, positions [B,T] int, mask [B,T] bool or None; returns [B,T,E] float32. Hugging Face counts
        a window in tokens, the spec in positions: in a sliding layer the real tokens of a row must be consecutive.
        Raises InputError, SpecError.
        """
        inputs = check_call(spec, x, positions, mask, None)
        _check_window(spec, inputs)
        modules = self._modules.get(spec, weights)
        hidden, at, real = _live_tensors(inputs)
        make_mask = create_causal_mask if spec.sliding_window is None else create_sliding_window_causal_mask
        attention_mask = make_mask(
            config=modules.config, inputs_embeds=hidden, attention_mask=real, past_key_values=None
        )
        output, _ = modules.attention(
            hidden,
            position_embeddings=modules.cos_sin(hidden, at),
            attention_mask=attention_mask,
            softcap=spec.softcap,  # forward hands it to eager_attention_forward, but never takes it from the config
        )
        return output.numpy()


class HuggingFaceAttention:
    """One layer, composed from Hugging Face's parts once per stream."""

    def __init__(self, spec: AttentionSpec, modules: Modules) -> None:
        self.spec = spec
        self._modules = modules
        lyra = set(spec.lyra_q_heads)
        vanilla = tuple(head for head in range(spec.num_attention_heads) if head not in lyra)
        self._vanilla = _Stream.of(spec, vanilla)
        self._lyra = _Stream.of(spec, spec.lyra_q_heads)

    @torch.inference_mode()
    def __call__(
        self,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
        cache: object | None = None,
        trace: bool = False,
    ) -> Result:
        """Output [B,T,E] float32; no cache and no trace. Raises InputError."""
        if cache is not None or trace:
            raise InputError(
                "the Hugging Face oracle has neither a cache nor a trace; give it all live tokens in one call"
            )
        inputs = check_call(self.spec, x, positions, mask, static)
        hidden, at, real = _live_tensors(inputs)
        live = _project(self._modules, hidden)
        causal = _causal(at, real, self.spec.sliding_window)
        heads = hidden.new_zeros(*hidden.shape[:2], self.spec.num_attention_heads, self.spec.head_dim)
        if self._vanilla.heads:
            heads[:, :, self._vanilla.heads] = self._attend(self._vanilla, live, at, causal, None)
        if self._lyra.heads:
            context = None if inputs.static is None else self._context(inputs.static, hidden)
            at = at + _live_start(self.spec, inputs.static)
            visible = _live_visible(self.spec, causal)
            heads[:, :, self._lyra.heads] = self._attend(self._lyra, live, at, visible, context)
        output = self._modules.attention.o_proj(heads.flatten(2))
        return Result(output.numpy(), None, {})

    def _attend(
        self, stream: _Stream, live: _Live, at: torch.Tensor, visible: torch.Tensor, context: _Context | None
    ) -> torch.Tensor:
        """The heads [B,T,n,D] of one stream: live tokens at `at` [B,T], `visible` [B,T,T] of them, and the context."""
        cos, sin = self._modules.cos_sin(live.query, at)
        query, key = self._modules.family.turn(live.query, live.key, cos, sin)
        query, key, value = query[:, stream.heads], key[:, stream.kv_heads], live.value[:, stream.kv_heads]
        if context is not None:
            batch, tokens = at.shape
            key = torch.cat((context.key[:, stream.static_heads].expand(batch, -1, -1, -1), key), dim=2)
            value = torch.cat((context.value[:, stream.static_heads].expand(batch, -1, -1, -1), value), dim=2)
            visible = torch.cat((context.visible[:, None].expand(batch, tokens, -1), visible), dim=2)
        attention = self._modules.attention
        heads, _ = self._modules.family.eager(
            attention if stream.whole_groups else _OWN_KEY_HEAD,
            query,
            key,
            value,
            torch.zeros(visible.shape).masked_fill(~visible, HIDDEN)[:, None],
            scaling=attention.scaling,
            softcap=self.spec.softcap,
        )
        # Under an additive mask, a row that sees nothing gives the mean of what it must not see. The clause says 0
        # (MASKED-2), so eager attention serves the rows that see something, and the others are selected away.
        return torch.where(visible.any(-1)[:, :, None, None], heads, 0.0)

    def _context(self, static: StaticLayer, like: torch.Tensor) -> _Context:
        """Static keys rotated at their own positions. Hidden slots are emptied: an additive mask cannot hide infinity,
        and a score made of large finite garbage may overflow to it (MASKED-1)."""
        visible = torch.tensor(static.mask)
        key, value = (torch.from_numpy(np.where(static.mask[:, None, :, None], part, 0.0)) for part in static[:2])
        cos, sin = self._modules.cos_sin(like, torch.tensor(static.positions))
        return _Context(self._modules.family.turn(key, key, cos, sin)[1], value, visible)


class _Live(NamedTuple):
    """Projected live tokens [B,heads,T,D]; query and key normed, not rotated."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


class _Context(NamedTuple):
    """Static tokens: key (rotated) and value [Bc,Hs,S,D], visible [Bc,S]."""

    key: torch.Tensor
    value: torch.Tensor
    visible: torch.Tensor


class _Stream(NamedTuple):
    """The query heads of a stream, the KV heads given to them, and where those stand on a static layer's axis Hs.

    With whole groups there is one KV head per group and `repeat_kv` inside eager attention spreads it; where the split
    cuts a group, every query head brings its own.
    """

    heads: list[int]
    kv_heads: list[int]
    static_heads: list[int]
    whole_groups: bool

    @classmethod
    def of(cls, spec: AttentionSpec, heads: Sequence[int]) -> _Stream:
        per_query = [head // spec.group_size for head in heads]
        groups = sorted(set(per_query))
        whole = len(groups) * spec.group_size == len(per_query)
        kv_heads = groups if whole else per_query
        axis = {head: place for place, head in enumerate(spec.lyra_kv_heads)}
        return cls(list(heads), kv_heads, [axis[head] for head in kv_heads if head in axis], whole)


class _OwnKeyHead(nn.Module):
    """What eager attention reads from a layer in which every query head has its own key head."""

    num_key_value_groups = 1


_OWN_KEY_HEAD = _OwnKeyHead().eval()


def _live_tensors(inputs: CallInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [B,T,E], positions [B,T] and mask [B,T]. Padding enters as zeros: whatever it holds, no score can overflow."""
    x = np.where(inputs.mask[:, :, None], inputs.x, np.float32(0))
    # positions and mask may be read-only views, which torch does not share: they are copied
    return torch.from_numpy(x), torch.tensor(inputs.positions), torch.tensor(inputs.mask)


def _project(modules: Modules, hidden: torch.Tensor) -> _Live:
    layer = modules.attention
    shape = (*hidden.shape[:-1], -1, layer.head_dim)
    return _Live(
        normed(layer, "q_norm", layer.q_proj(hidden).view(shape).transpose(1, 2)),
        normed(layer, "k_norm", layer.k_proj(hidden).view(shape).transpose(1, 2)),
        layer.v_proj(hidden).view(shape).transpose(1, 2),
    )


def _causal(at: torch.Tensor, real: torch.Tensor, window: int | None) -> torch.Tensor:
    """Visible [B,T,T] (query, key): real keys up to the query's own position, within the window (SLIDING-1)."""
    query, key = at[:, :, None], at[:, None, :]
    visible = (key <= query) & real[:, None, :]
    return visible if window is None else visible & (key > query - window)


def _live_visible(spec: AttentionSpec, causal: torch.Tensor) -> torch.Tensor:
    """What Lyra heads see of the live tokens, [B,T,T] (clause LIVE)."""
    own = torch.eye(causal.shape[-1], dtype=torch.bool)
    return causal & torch.where(own, spec.static.sees.own, spec.static.sees.earlier)


def _live_start(spec: AttentionSpec, static: StaticLayer | None) -> torch.Tensor:
    """P [Bc,1]: what is added to the positions of the Lyra stream's live tokens (clause POSITION)."""
    if static is None or spec.static.positions == "overlay":
        return torch.zeros(1, 1, dtype=torch.int64)
    highest = np.max(static.positions, axis=1, where=static.mask, initial=-1, keepdims=True)
    return torch.from_numpy(highest + 1)


def _check_window(spec: AttentionSpec, inputs: CallInputs) -> None:
    if spec.sliding_window is None:
        return
    offset = inputs.positions - np.arange(inputs.positions.shape[1])
    for row, (offsets, real) in enumerate(zip(offset, inputs.mask, strict=True)):
        if len(set(offsets[real].tolist())) > 1:
            raise InputError(
                f"row {row}: the real tokens sit at positions {inputs.positions[row][real].tolist()}, not consecutive "
                f"ones; Hugging Face counts the window ({spec.sliding_window}) in tokens. Call attention(...) instead "
                f"of plain(...)"
            )
