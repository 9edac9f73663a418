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
from .dtype import constant
from .layer import Cache, Call, Shape, layer_of
from .sequential import BlockNumbers, block_numbers, block_of, reading_only, run_block
from .static import StaticKV


class ExternalBlock(NamedTuple):
    """A block that reads a context of its own, and live keys of its own where its heads see earlier tokens."""

    numbers: BlockNumbers
    static: StaticKV | None


class OwnBlock(NamedTuple):
    """A block whose queries read the live cache of the layer's own attention."""

    numbers: BlockNumbers
    static: None = None


Injected = ExternalBlock | OwnBlock


def make_block(spec: SequentialSpec, static: StaticKV | None) -> Injected:
    """The numbers of a block, and its context."""
    numbers = block_numbers(spec)
    if static is None:
        numbers = numbers._replace(attention=numbers.attention._replace(heads=None))
    return OwnBlock(numbers) if spec.source == "own" else ExternalBlock(numbers, static)


def with_gate(injected: Injected, gate: float) -> Injected:
    """The same block with another gate; nothing is compiled again."""
    return injected._replace(numbers=injected.numbers._replace(gate=jax.device_put(constant(gate))))


def remembering(attached: Mapping[int, Any]) -> tuple[int, ...]:
    """The layers whose blocks need live keys of their own: those where a head sees earlier tokens."""
    return tuple(
        sorted(layer for layer, held in attached.items() if isinstance(held, ExternalBlock) and _looks_back(held))
    )


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


def run_injected(
    h: Array,
    injected: Injected,
    weights: Mapping[str, Array],
    shape: Shape,
    call: Call,
    own: Cache,
    memory: LiveCache | None,
    trace: dict[str, Array] | None = None,
) -> tuple[Array, LiveCache | None]:
    """The residual stream h [B,T,E] behind the block, and its live keys with the call's, if it keeps any.

    `weights` are named as in `SequentialSpec.weight_shapes`; `own` is the cache of the layer's own attention, which
    holds the call's tokens already; `trace` is given what `run_block` gives.
    """
    numbers = injected.numbers
    layer = layer_of(weights, numbers.attention, shape)
    block = block_of(numbers, reading_only(layer) if isinstance(injected, OwnBlock) else layer, weights)
    call = call._replace(static=injected.static, turn=None)  # a block may have another RoPE
    if isinstance(injected, OwnBlock):
        h, _ = run_block(h, block, call._replace(cache=own), trace)
        return h, None
    if memory is None:  # then no head sees an earlier token, and the call's own are all there is
        alone = call._replace(cache=_room_for(call, shape, h.dtype), first=True)
        return run_block(h, block, alone, trace)[0], None
    return run_block(h, block, call._replace(cache=memory), trace)


def _looks_back(injected: ExternalBlock) -> bool:
    rule = injected.numbers.attention.rule
    return rule is None or bool(np.asarray(rule.earlier).any())


def _room_for(call: Call, shape: Shape, dtype: np.dtype[Any]) -> LiveCache:
    batch, tokens = call.mask.shape
    return empty_cache(batch, shape.kv_heads, shape.head_dim, tokens, dtype)
