"""The attention of a layer of JAX's decoder, with the model's own caches, as an `Attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lyra.backends.jax_impl import tuning
from lyra.backends.jax_impl.decoder import ModelCache, empty_model_cache
from lyra.backends.jax_impl.dtype import leave
from lyra.backends.jax_impl.injected import remembering
from lyra.backends.jax_impl.tokens import Packed, Tokens, pack_left
from lyra.backends.protocol import Gradients, Result, Unsupported
from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError
from lyra.spec.inputs import (
    CallInputs,
    StaticLayer,
    check_call,
    check_cotangent,
    check_differentiable,
    check_dtype,
    check_weights,
)

from .history import so_far
from .jax_host import PLACE, Host

ROOM = 512
"""Slots of a model's cache, more than any case has live tokens."""


class ModuleCache(NamedTuple):
    """A model's cache, the mask and positions [B,L] of its tokens, and the layer that filled it.

    `before` is the cache as it was when the last call came, and `fed` what that call brought.
    """

    model: ModelCache
    mask: np.ndarray
    positions: np.ndarray
    owner: ModuleAttention | None = None
    before: ModuleCache | None = None
    fed: CallInputs | None = None


class ModuleAttention:
    """The attention of a decoder's layer, as an `Attention`."""

    def __init__(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
        self.spec = spec
        self.dtype = check_dtype(dtype)
        self.weights = {name: array.copy() for name, array in check_weights(spec, weights).items()}
        self.host = Host(spec, of_layer(self.weights), self.dtype, alike=False)

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
        """Run the model over x in its layer. Shapes as in the protocol. Raises InputError, Unsupported."""
        inputs = check_call(self.spec, x, positions, mask, static)
        past = past_of(cache, inputs)
        attach(self.host, self.spec, inputs.static)
        packed = packed_for(self.spec, past, inputs)
        made = self.host.run(columns(inputs.x, packed), None, packed.mask, begun(self.host, past, inputs), past is None)
        after = followed(self, made[1], past, inputs)
        return answer(made, after, packed, self.spec.trace_names() if trace else ())

    def vjp(
        self,
        cotangent: np.ndarray,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
    ) -> Gradients:
        """Gradients of sum(cotangent · output) by jax.vjp, the context being a tuned one. Raises as a call."""
        check_differentiable(self.dtype)
        inputs = check_call(self.spec, x, positions, mask, static)
        given = check_cotangent(cotangent, inputs)
        tuned: Any = ({}, {})
        if inputs.static is not None and inputs.static.mask.shape[1]:
            assert self.spec.split is not None
            tuned = tuning.tunable(self.host.spec, {PLACE: inputs.static}, {PLACE: self.spec.split}, self.spec.static)
        attach(self.host, self.spec, None)
        packed = packed_for(self.spec, None, inputs)
        held = begun(self.host, None, inputs)
        of_x, of_state, of_context = self.host.pull_back(
            columns(given, packed), columns(inputs.x, packed), packed.mask, held, tuned
        )
        by_name = dict(zip(self.host.built.names, of_state, strict=True))
        weights = {name: np.array(by_name[f"layers.{PLACE}.self_attn.{name}"]) for name in self.spec.weight_shapes()}
        of_kv: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
        if static is not None:
            found = of_context.get(PLACE)
            of_kv = (
                np.zeros(static.k.shape, np.float32) if found is None else np.array(found.k),
                np.zeros(static.v.shape, np.float32) if found is None else np.array(found.v),
            )
        return Gradients(back(np.asarray(of_x), packed), weights, *of_kv)


def of_layer(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of an attention by their names within a decoder layer."""
    return {f"self_attn.{name}": array for name, array in weights.items()}


def attach(host: Host, spec: AttentionSpec, static: StaticLayer | None) -> None:
    """Give the layer the context of a call, or none, through the engine; a layer without Lyra heads has none."""
    if spec.lyra_q_heads:
        assert spec.split is not None
        host.engine.attach({} if static is None else {PLACE: static}, {PLACE: spec.split}, spec.static)


def past_of(cache: object | None, inputs: CallInputs) -> ModuleCache | None:
    """A cache that goes on with a call. Raises InputError."""
    if cache is None:
        return None
    if not isinstance(cache, ModuleCache):
        raise InputError(f"cache is a {type(cache).__name__}; give the cache of an earlier Result of this backend")
    if len(cache.mask) != len(inputs.mask):
        raise InputError(f"the cache has {len(cache.mask)} rows, x has {len(inputs.mask)}; give matching rows")
    return cache


def packed_for(spec: AttentionSpec, past: ModuleCache | None, inputs: CallInputs) -> Packed:
    """Where the call's tokens stand in the model, padding on the left. Raises Unsupported for what it cannot be given.

    Calls are padded to a common width, as prompts are. A token that is decoded has a column of its own, and so has each
    token that goes into a ring behind others: padding there would take the places of tokens.
    """
    mask, positions = so_far(past, inputs)
    for row, shown in zip(positions, mask, strict=True):
        if (np.diff(row[shown]) != 1).any():
            raise Unsupported("a decoder of JAX counts the positions of its tokens itself, one after the other")
    if spec.sliding_window is not None and past is not None and not inputs.mask.all():
        raise Unsupported("a ring of the last W slots serves rows whose padding is in front of all of their tokens")
    if mask.shape[1] > ROOM - 16:
        raise Unsupported(f"the model's cache is opened for {ROOM} slots")
    tokens, length = Tokens(np.zeros(inputs.mask.shape, np.int32), inputs.mask), inputs.mask.shape[1]
    exact = past is not None and (length == 1 or spec.sliding_window is not None)
    return pack_left(tokens, length) if exact else pack_left(tokens)


def begun(host: Host, past: ModuleCache | None, inputs: CallInputs) -> ModelCache:
    """The cache that a call goes on from: an empty one, whose count begins where a row's first real token is.

    A model of its own begins at 0; a row that has had no real token yet begins where the suite says.
    """
    if past is None:
        batch = len(inputs.mask)
        held = empty_model_cache(host.spec, batch, 0, host.dtype, remembering(host.attached))
        begun_before = np.zeros(batch, dtype=bool)
    else:
        held, begun_before = past.model, np.asarray(past.mask.any(axis=1))
    first = inputs.positions[np.arange(len(inputs.mask)), inputs.mask.argmax(axis=1)]
    counts: Any = np.where(begun_before, np.asarray(held.counts), first).astype(np.int32)
    return held._replace(counts=counts)


def followed(layer: ModuleAttention, model: ModelCache, past: ModuleCache | None, inputs: CallInputs) -> ModuleCache:
    """The cache with the call's tokens."""
    return ModuleCache(model, *so_far(past, inputs), layer, past, inputs)


def answer(made: Any, after: object, packed: Packed, names: tuple[str, ...]) -> Result:
    """What a call gives, in the caller's order of tokens."""
    output, _, stages = made
    return Result(back(leave(output), packed), after, {name: back(leave(stages[name]), packed) for name in names})


def columns(x: np.ndarray, packed: Packed) -> np.ndarray:
    """x [B,T,E] in the columns of the model, [B,N,E]."""
    made = np.zeros((*packed.ids.shape, x.shape[2]), x.dtype)
    np.put_along_axis(made, packed.source[:, :, None], x, axis=1)
    return made


def back(value: np.ndarray, packed: Packed) -> np.ndarray:
    """The tokens [B,T,...] of the caller out of the columns of the model, a copy."""
    source = packed.source.reshape(*packed.source.shape, *(1,) * (value.ndim - 2))
    return np.ascontiguousarray(np.take_along_axis(value, source, axis=1))
