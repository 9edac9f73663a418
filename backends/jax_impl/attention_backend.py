"""One attention layer behind the protocol: NumPy in, NumPy out, one compiled function a layer call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from lyra.backends.protocol import Gradients, Result
from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError
from lyra.spec.inputs import (
    CallInputs,
    StaticLayer,
    check_call,
    check_cotangent,
    check_differentiable,
    check_dtype,
    check_length,
    check_rows,
    check_weights,
)

from . import cache as live
from .cache import LiveCache
from .dtype import DTYPES, enter, leave, to_device
from .gradients import complete, layer_gradients
from .layer import Call, Numbers, Shape, layer_of, numbers_of, run_layer, shape_of
from .shapes import general, make_room, pad_slots, pad_tokens
from .static import PlacedStatic, place_static, rotate_static


@partial(jax.jit, static_argnames="shape")
def call_layer(
    x: Array,
    positions: Array,
    mask: Array,
    weights: Mapping[str, Array],
    numbers: Numbers,
    static: PlacedStatic | None,
    cache: LiveCache,
    *,
    shape: Shape,
) -> tuple[Array, LiveCache, dict[str, Array]]:
    """A whole layer call in one compiled function: output, cache and trace; the cache must have room for its tokens."""
    rotated, trace = None if static is None else rotate_static(static, numbers.frequencies), dict[str, Array]()
    call = Call(positions, mask, rotated, cache)
    output, after = run_layer(x, layer_of(weights, numbers, shape), call, trace)
    return output, after, trace


class JaxAttention:
    """One attention layer in JAX (protocol `Attention`). The weights move to the device here, once."""

    def __init__(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
        """Raises InputError where the weights are not those of the spec."""
        self.spec = spec
        self.dtype = check_dtype(dtype)
        self._stored = DTYPES[self.dtype]
        self._shape = shape_of(spec)
        entered = {name: enter(value, self._stored) for name, value in check_weights(spec, weights).items()}
        make_room(to_device)
        self._weights: dict[str, Array]
        self._numbers: Numbers
        self._weights, self._numbers = to_device((entered, general(numbers_of(spec), self._shape)))
        self._trace_names = spec.trace_names()

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
        """Attend. x [B,T,E] float32, positions [B,T] int, mask [B,T] bool; see protocol `Attention`.

        Raises InputError.
        """
        inputs = check_call(self.spec, x, positions, mask, static)
        tokens = inputs.mask.shape[1]
        inputs, past, placed = self.prepare(inputs, cache)
        make_room(call_layer)
        output, cache_after, stages = call_layer(
            enter(inputs.x, self._stored),
            inputs.positions.astype(np.int32),
            inputs.mask,
            self._weights,
            self._numbers if placed is not None else self._numbers._replace(heads=None),
            None if placed is None else pad_slots(placed),
            live.with_room(past, inputs.mask.shape[1]),
            shape=self._shape,
        )
        values = {name: leave(stages[name])[:, :tokens] for name in self._trace_names} if trace else {}
        return Result(leave(output)[:, :tokens], cache_after._replace(length=past.length + tokens), values)

    def prepare(self, inputs: CallInputs, cache: object | None) -> tuple[CallInputs, LiveCache, PlacedStatic | None]:
        """Checked arguments, padded to a common number of tokens; the cache, or an empty one; the context in place.

        Raises InputError for a cache that does not fit.
        """
        batch = len(inputs.mask)
        inputs = pad_tokens(inputs)
        past = self._empty_cache(batch, inputs.mask.shape[1]) if cache is None else _live_cache(cache)
        if past.batch != batch:
            raise InputError(f"the cache has {past.batch} rows, x has {batch}; reorder the cache or give matching rows")
        if past.keys.dtype != self._stored:
            raise InputError(f"the cache is not that of a {self.dtype} layer; give one that this layer returned")
        placed = None if inputs.static is None else place_static(self.spec, inputs.static, self._stored)
        return inputs, past, placed

    def vjp(
        self,
        cotangent: np.ndarray,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
    ) -> Gradients:
        """Gradients of sum(cotangent * output); cotangent [B,T,E], the rest as in a call. Raises InputError."""
        check_differentiable(self.dtype)
        inputs = check_call(self.spec, x, positions, mask, static)
        checked = check_cotangent(cotangent, inputs)
        found = layer_gradients(self.spec, self._weights, inputs, checked, numbers=self._numbers, shape=self._shape)
        return complete(found, static)

    def reorder(self, cache: object, rows: Sequence[int] | np.ndarray) -> LiveCache:
        """A new cache whose row i is row rows[i] of `cache` (beam search), repeats allowed. Raises InputError."""
        own = _live_cache(cache)
        return live.reorder(own, check_rows(rows, own.batch))

    def crop(self, cache: object, length: int) -> LiveCache:
        """A new cache with the first `length` tokens of `cache`, padding included. Raises InputError."""
        own = _live_cache(cache)
        return live.crop(own, check_length(length, int(own.length)))

    def _empty_cache(self, batch: int, tokens: int) -> LiveCache:
        return live.empty_cache(batch, self._shape.kv_heads, self._shape.head_dim, live.bucket(tokens), self._stored)


def _live_cache(cache: Any) -> LiveCache:
    if not isinstance(cache, LiveCache):
        raise InputError(f"cache is a {type(cache).__name__}; give the cache of an earlier Result of this backend")
    return cache
