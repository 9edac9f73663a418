"""SequentialSpec: an attention block of its own, injected into a decoder layer behind self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator

from . import families
from .attention import AttentionSpec, Positive, StaticSpec
from .base import SpecModel
from .errors import InputError
from .split import HeadSplit

Source = Literal["external", "own"]

KEY_STAGES = frozenset({"k_proj", "v_proj", "k_norm", "k_rope"})
"""Stages of keys and values: those of the layer, not of the block, where the block shares the layer's cache."""


class SequentialSpec(SpecModel):
    """An attention block between self-attention's residual add and the pre-feed-forward norm (clause SEQUENTIAL).

    block(h) = (h if residual else 0) + gate · rms_norm(attention(rms_norm(h, input_norm)), output_norm)

    h [B,T,E] is the residual stream there; both norms run over E with weight 1 + w and eps `norm_eps`, and
    output_norm=False leaves the outer one out. source "external": the attention has keys, values, live cache and static
    context of its own. "own": its queries attend to the live cache of the layer's own attention, and it has no context,
    hence no Lyra heads.

    Raises SpecError. Source: SPEC.md.
    """

    attention: AttentionSpec
    residual: bool = True
    gate: float = 0.0
    norm_eps: Positive = 1e-6
    output_norm: bool = True
    source: Source = "external"

    @model_validator(mode="after")
    def _consistent(self) -> SequentialSpec:
        if self.source == "own" and self.attention.lyra_q_heads:
            raise ValueError(
                f"source='own' reads the model's own cache and no context, so no head goes to Lyra, got "
                f"{self.attention.lyra_q_heads}; give an attention with split=None or source='external' "
                f"(clause SEQUENTIAL)"
            )
        return self

    @classmethod
    def for_layer(cls, layer: AttentionSpec, **fields: Any) -> Self:
        """The block that a global layer gets by default: every head reads the external context and nothing else.

        With source="own" no head goes to Lyra. `fields` are those of the class. Raises SpecError, also for a
        sliding-window layer with source "external".
        """
        if fields.get("source") == "own":
            attention = layer.replace(split=None)
        else:
            attention = layer.replace(split=HeadSplit.all(layer), static=StaticSpec(live="none"))
        eps = {} if layer.qk_norm is None else {"norm_eps": layer.qk_norm.eps}
        return cls(attention=attention, **(eps | fields))

    @property
    def hidden_size(self) -> int:
        """E, the width of the residual stream."""
        return self.attention.hidden_size

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight: the norms over E, and those of the attention under their own names.

        With source "own" the k and v projections and k_norm are there too, and nothing reads them: the same weights
        serve both sources.
        """
        shapes: dict[str, tuple[int, ...]] = {"input_norm.weight": (self.hidden_size,)}
        if self.output_norm:
            shapes["output_norm.weight"] = (self.hidden_size,)
        return shapes | self.attention.weight_shapes()

    def trace_names(self) -> tuple[str, ...]:
        """The trace entries of the block, in order; the attention's output is called `attention` (SEQUENTIAL-8)."""
        *inner, _ = self.attention.trace_names()
        if self.source == "own":
            inner = [name for name in inner if name not in KEY_STAGES]
        last = ("output_norm", "output") if self.output_norm else ("output",)
        return ("input_norm", *inner, "attention", *last)

    def weights_of(self, layer: Mapping[str, np.ndarray], family: str = families.DEFAULT) -> dict[str, np.ndarray]:
        """The block's weights, initialised from those of its decoder layer, in a model of `family` (SEQUENTIAL-7).

        `layer` goes by Hugging Face's names within the layer: `input_layernorm.weight`, `self_attn.q_proj.weight`, …,
        `post_attention_layernorm.weight`; others are not read. The arrays are handed on, not copied. Raises InputError.
        """
        owner = families.family(family)
        norms, attention = owner.block_weights, owner.names.attention
        names = {name: norms.get(name, f"{attention}.{name}") for name in self.weight_shapes()}
        missing = sorted(theirs for theirs in names.values() if theirs not in layer)
        if missing:
            raise InputError(
                f"the layer's weights lack {missing}; give the state dict of one {owner.title} decoder layer, names "
                f"as within the layer"
            )
        return {name: layer[theirs] for name, theirs in names.items()}
