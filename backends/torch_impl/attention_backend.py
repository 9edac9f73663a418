"""The protocol's layer: NumPy in, torch inside, NumPy out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

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

from .cache import LiveCache, crop, empty_cache, reorder
from .dtype import DTYPES, enter, leave
from .gradients import complete, layer_gradients
from .layer import Call, layer_of, numbers_of, run_layer, shape_of
from .static import StaticKV, place_static, prepare_static


def on(device: str) -> AbstractContextManager[object]:
    """Within it tensors are made on `device`. The CPU needs no such mode, which costs time at every call."""
    return nullcontext() if device == "cpu" else torch.device(device)


class TorchAttention:
    """One attention layer in PyTorch, on `device`. Implements `lyra.backends.protocol.Attention`."""

    def __init__(
        self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], dtype: str = "float32", device: str = "cpu"
    ) -> None:
        self.spec = spec
        self.dtype = check_dtype(dtype)
        self.device = device
        self.stored = DTYPES[self.dtype]
        checked = check_weights(spec, weights)
        with on(device):
            self.weights = {name: enter(value, self.stored) for name, value in checked.items()}
            self.layer = layer_of(self.weights, numbers_of(spec), shape_of(spec))

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
        """Run the layer. Shapes as in the protocol; raises InputError for inputs that contradict the spec."""
        inputs = check_call(self.spec, x, positions, mask, static)
        with on(self.device), torch.inference_mode():
            entered = enter(inputs.x, self.stored)
            stages: dict[str, torch.Tensor] | None = {} if trace else None
            output, live = run_layer(entered, self.layer, self.prepare(inputs, cache), stages)
            names = self.spec.trace_names()
            traced = {name: leave(value) for name, value in (stages or {}).items() if name in names}
            return Result(leave(output), live, traced)

    def prepare(self, inputs: CallInputs, cache: object | None) -> Call:
        """Checked arguments and a cache as tensors. Raises InputError for a cache that does not fit."""
        past = self._empty(len(inputs.x)) if cache is None else self._own(cache)
        if len(past.mask) != len(inputs.x):
            raise InputError(
                f"cache holds {len(past.mask)} rows and x {len(inputs.x)}; reorder the cache or start without one"
            )
        if past.keys.dtype != self.stored:
            raise InputError(f"the cache is not that of a {self.dtype} layer; give one that this layer returned")
        # Copies, so that the caller's arrays are never aliased and every call sees the same memory alignment.
        positions, mask = torch.tensor(inputs.positions), torch.tensor(inputs.mask)
        return Call(positions, mask, self._static(inputs.static), past)

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
        with on(self.device):
            found = layer_gradients(self.spec, self.weights, inputs, check_cotangent(cotangent, inputs))
        return complete(found, static)

    def reorder(self, cache: object, rows: Sequence[int] | np.ndarray) -> LiveCache:
        """A new cache whose row i is row rows[i] of `cache` (beam search), repeats allowed. Raises InputError."""
        own = self._own(cache)
        with on(self.device):
            return reorder(own, check_rows(rows, len(own.mask)))

    def crop(self, cache: object, length: int) -> LiveCache:
        """A new cache with the first `length` tokens of `cache`, padding included. Raises InputError."""
        own = self._own(cache)
        return crop(own, check_length(length, own.mask.shape[1]))

    def _static(self, static: StaticLayer | None) -> StaticKV | None:
        placed = None if static is None else place_static(self.spec, static, self.stored)
        return None if placed is None else prepare_static(placed, self.layer.numbers.frequencies)

    def _empty(self, rows: int) -> LiveCache:
        return empty_cache(rows, self.spec.num_key_value_heads, self.spec.head_dim, dtype=self.stored)

    @staticmethod
    def _own(cache: object) -> LiveCache:
        if not isinstance(cache, LiveCache):
            raise InputError(
                f"cache is a {type(cache).__name__}; expected what an earlier call of this backend returned"
            )
        return cache
