"""An injected attention block: norm, attention, norm, and the gate through which it joins the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from lyra.spec.array_types import Bool, Float
from lyra.spec.sequential import SequentialSpec

from .dtype import Given, constant, store
from .layer import Call, Layer, Map, Numbers, numbers_of, run_layer, shape_of
from .norm import rms_norm
from .shapes import general


class Block(NamedTuple):
    """What a block computes with: norms over E (the outer one, if it has one), its attention, and how it joins h.

    gate float32 [], residual bool [].
    """

    input_norm: Map
    attention: Layer
    output_norm: Map | None
    gate: Array
    residual: Array


class BlockNumbers(NamedTuple):
    """The numbers of a block: those of its attention, the eps of its norms, None without the outer one, how it joins h:
    gate float32, residual bool.
    """

    attention: Numbers
    input_eps: Array
    output_eps: Array | None
    gate: Array
    residual: Array


def block_numbers(spec: SequentialSpec) -> BlockNumbers:
    """The part of a block's spec that travels as arrays."""
    return BlockNumbers(
        attention=general(numbers_of(spec.attention), shape_of(spec.attention)),
        input_eps=constant(spec.norm_eps),
        output_eps=constant(spec.norm_eps) if spec.output_norm else None,
        gate=constant(spec.gate),
        residual=constant(spec.residual, bool),
    )


def block_of(numbers: BlockNumbers, layer: Layer, weights: Mapping[str, Array]) -> Block:
    """The block of these numbers around its attention, with the weights of its norms by name. Clause SEQUENTIAL."""
    input_norm = partial(rms_norm, weight=weights["input_norm.weight"], eps=numbers.input_eps)
    output_norm = None
    if numbers.output_eps is not None:
        output_norm = partial(rms_norm, weight=weights["output_norm.weight"], eps=numbers.output_eps)
    return Block(input_norm, layer, output_norm, numbers.gate, numbers.residual)


def reading_only(layer: Layer) -> Layer:
    """The same attention without keys of its own: it reads what its cache holds. Clause SEQUENTIAL-6."""
    return layer._replace(parts=layer.parts._replace(k_proj=None, v_proj=None, k_norm=None))


def run_block(
    h: Float[Array, "B T E"], block: Block, call: Call, trace: dict[str, Array] | None = None
) -> tuple[Float[Array, "B T E"], Any]:
    """The block over the residual stream h [B,T,E]: output [B,T,E] and the live cache. Clause SEQUENTIAL.

    `trace` is given what every stage makes, the attention's output by the name "attention" (SEQUENTIAL-8).
    """
    normed = block.input_norm(h)
    y, cache = run_layer(normed, block.attention, call, trace)
    if trace is not None:
        trace |= {"input_norm": normed, "attention": y}
    if block.output_norm is not None:
        y = block.output_norm(y)
        if trace is not None:
            trace["output_norm"] = y
    result = join(h, y, block.gate, block.residual)
    if trace is not None:
        trace["output"] = result
    return result, cache


def join(
    h: Float[Array, "B T E"], y: Float[Array, "B T E"], gate: Float[Given, ""], residual: Bool[Given, ""]
) -> Float[Array, "B T E"]:
    """(h if residual else 0) + gate · y, h and y [B,T,E], summed in float32 and rounded once to h's type.

    With the residual a gate of 0 gives h itself, whatever y is. Clauses SEQUENTIAL-1, SEQUENTIAL-3.
    """
    change = gate * y
    return store(jnp.where(residual, jnp.where(gate == 0, h, h + change), change), h.dtype)
