"""An injected attention block: the numbers of its norms, and the gate through which it joins the residual stream."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from lyra.spec.sequential import SequentialSpec

from .cache import LiveCache
from .dtype import constant
from .layer import Call, Constants, Flow, Layer, attend_to, constants_of, output, projection
from .norm import rms_norm
from .rope import cos_sin, rotate
from .shapes import general


class BlockConstants(NamedTuple):
    """The numbers of a block: those of its attention, norm_eps and gate float32, residual bool."""

    attention: Constants
    norm_eps: Array
    gate: Array
    residual: Array


def block_constants(spec: SequentialSpec) -> BlockConstants:
    """The part of a block's spec that travels as arrays."""
    return BlockConstants(
        attention=general(constants_of(spec.attention), spec.attention.num_attention_heads),
        norm_eps=constant(spec.norm_eps),
        gate=constant(spec.gate),
        residual=constant(spec.residual, bool),
    )


def run_on_own_cache(x: Array, layer: Layer, call: Call) -> tuple[Array, None, dict[str, Array]]:
    """The queries of x over the cache that the layer's own attention made, which holds the call's tokens already.

    Returns what `run_layer` does, but no cache. Clauses SEQUENTIAL-5 and SEQUENTIAL-6.
    """
    assert isinstance(call.cache, LiveCache)
    x = jnp.where(call.mask[:, :, None], x, 0.0)
    trace = {"q_proj": (q := projection(x, layer, "q_proj", layer.shape.query_heads))}
    if layer.constants.eps is not None:
        trace["q_norm"] = q = rms_norm(q, layer.weights["q_norm.weight"], layer.constants.eps)
    if layer.constants.frequencies is not None:
        cos, sin = (part[:, :, None] for part in cos_sin(call.positions, layer.constants.frequencies))
        trace["q_rope"] = q = rotate(q, cos, sin)
    flow = attend_to(call.cache.used(), Flow(call.cache, {"q": q}), layer, call)
    trace["heads"] = flow.values["heads"]
    return output(flow, layer, call).values["output"], None, trace


def join(constants: BlockConstants, h: Array, y: Array) -> Array:
    """(h if residual else 0) + gate · y, h and y [B,T,E]; a closed gate gives h itself. Clause SEQUENTIAL-3."""
    change = constants.gate * y
    return jnp.where(constants.residual, jnp.where(constants.gate == 0, h, h + change), change)
