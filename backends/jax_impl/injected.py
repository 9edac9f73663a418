"""Attention blocks injected into the decoder layers of a model, with the layers' own weights (clause SEQUENTIAL)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec
from lyra.spec.sequential import SequentialSpec

from .cache import LiveCache, empty_cache
from .dtype import constant, store
from .layer import Cache, Call, Layer, Shape, run_layer
from .norm import rms_norm
from .sequential import BlockConstants, block_constants, join, run_on_own_cache
from .static import StaticKV


class ExternalBlock(NamedTuple):
    """A block that reads a context of its own, and live keys of its own where its heads see earlier tokens.

    output_eps  None where the block has no output norm
    """

    constants: BlockConstants
    output_eps: Array | None
    static: StaticKV | None


class OwnBlock(NamedTuple):
    """A block whose queries read the live cache of the layer's own attention."""

    constants: BlockConstants
    output_eps: Array | None
    static: None = None


Block = ExternalBlock | OwnBlock


def make_block(spec: SequentialSpec, static: StaticKV | None) -> Block:
    """The numbers of a block, and its context."""
    constants = block_constants(spec)
    if static is None:
        constants = constants._replace(attention=constants.attention._replace(split=None))
    output_eps = constant(spec.norm_eps) if spec.output_norm else None
    return OwnBlock(constants, output_eps) if spec.source == "own" else ExternalBlock(constants, output_eps, static)


def with_gate(block: Block, gate: float) -> Block:
    """The same block with another gate; nothing is compiled again."""
    return block._replace(constants=block.constants._replace(gate=jax.device_put(constant(gate))))


def remembering(blocks: Mapping[int, Any]) -> tuple[int, ...]:
    """The layers whose blocks need live keys of their own: those where a head sees earlier tokens."""
    return tuple(sorted(layer for layer, one in blocks.items() if isinstance(one, ExternalBlock) and _looks_back(one)))


def check_blocks(spec: ModelSpec, static: Collection[int], blocks: Mapping[int, SequentialSpec]) -> None:
    """Refuse blocks and contexts that have no place in the model. Raises InputError."""
    outside = sorted(set(blocks) - set(range(spec.num_hidden_layers))) or sorted(set(static) - set(blocks))
    if outside:
        raise InputError(f"inject: layers {outside} have no place for a block or no block for their context")
    own = sorted(layer for layer in blocks if blocks[layer].source == "own")
    if set(own) & set(static):
        raise InputError(f"inject: layers {own} have a context, and source='own' reads the model's cache; leave it out")
    sliding = sorted(set(own) - set(spec.global_layers))
    if sliding:
        raise InputError(
            f"inject: layers {sliding} keep a window of keys only, and source='own' needs all; take global ones, "
            f"{list(spec.global_layers)}"
        )


def run_block(
    block: Block, h: Array, weights: Mapping[str, Array], shape: Shape, call: Call, own: Cache, memory: LiveCache | None
) -> tuple[Array, LiveCache | None]:
    """The residual stream h [B,T,E] behind the block, and its live keys with the call's, if it keeps any.

    `weights` are named as in `SequentialSpec.weight_shapes`; `own` is the cache of the layer's own attention, which
    holds the call's tokens already. Clauses SEQUENTIAL-1 to SEQUENTIAL-6.
    """
    constants = block.constants
    x, layer = rms_norm(h, weights["input_norm.weight"], constants.norm_eps), Layer(weights, constants.attention, shape)
    if isinstance(block, OwnBlock):
        y, _, _ = run_on_own_cache(x, layer, call._replace(cache=own))
    else:
        alone = memory is None  # then no head sees an earlier token, and the call's own are all there is
        past = _room_for(call, shape, h.dtype) if memory is None else memory
        seen = call._replace(static=block.static, cache=past, first=call.first or alone)
        y, after, _ = run_layer(x, layer, seen)
        assert isinstance(after, LiveCache)
        memory = None if alone else after
    if block.output_eps is not None:
        y = rms_norm(y, weights["output_norm.weight"], block.output_eps)
    return store(join(constants, h, y), h.dtype), memory


def _looks_back(block: ExternalBlock) -> bool:
    rule = block.constants.attention.rule
    return rule is None or bool(np.asarray(rule.earlier).any())


def _room_for(call: Call, shape: Shape, dtype: np.dtype[Any]) -> LiveCache:
    batch, tokens = call.mask.shape
    return empty_cache(batch, shape.kv_heads, shape.head_dim, tokens, dtype)
