"""The protocol adaptor: NumPy in, torch inside, NumPy out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

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
from lyra.spec.sequential import SequentialSpec

from .cache import LiveCache
from .dtype import DTYPES, enter, leave
from .gradients import complete, layer_gradients
from .heads import lyra_heads
from .layer import Call, run
from .static import prepare_static

if TYPE_CHECKING:
    from .model import TorchEngine
    from .sequential import TorchSequential


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
            self.lyra = lyra_heads(spec.split, spec.num_attention_heads, spec.num_key_value_heads)

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
            output, live, stages = run(self.spec, self.weights, self.lyra, self.prepare(inputs, cache))
            traced = {name: leave(value) for name, value in stages.items()} if trace else {}
            return Result(leave(output), live, traced)

    def prepare(self, inputs: CallInputs, cache: object | None) -> Call:
        """Checked arguments and a cache as tensors. Raises InputError for a cache that does not fit."""
        past = None if cache is None else self._own(cache)
        if past is not None and len(past.mask) != len(inputs.x):
            raise InputError(
                f"cache holds {len(past.mask)} rows and x {len(inputs.x)}; reorder the cache or start without one"
            )
        if past is not None and past.k.dtype != self.stored:
            raise InputError(f"the cache is not that of a {self.dtype} layer; give one that this layer returned")
        # Copies, so that the caller's arrays are never aliased and every call sees the same memory alignment.
        return Call(
            enter(inputs.x, self.stored),
            torch.tensor(inputs.positions),
            torch.tensor(inputs.mask),
            prepare_static(self.spec, inputs.static, self.stored),
            past,
        )

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
            found = layer_gradients(self.spec, self.weights, self.lyra, inputs, check_cotangent(cotangent, inputs))
        return complete(found, static)

    def reorder(self, cache: object, rows: Sequence[int] | np.ndarray) -> LiveCache:
        """A new cache whose row i is row rows[i] of `cache` (beam search), repeats allowed. Raises InputError."""
        own = self._own(cache)
        with on(self.device):
            return own.reorder(check_rows(rows, len(own.mask)))

    def crop(self, cache: object, length: int) -> LiveCache:
        """A new cache with the first `length` tokens of `cache`, padding included. Raises InputError."""
        own = self._own(cache)
        return own.crop(check_length(length, own.mask.shape[1]))

    @staticmethod
    def _own(cache: object) -> LiveCache:
        if not isinstance(cache, LiveCache):
            raise InputError(
                f"cache is a {type(cache).__name__}; expected what an earlier call of this backend returned"
            )
        return cache


class TorchBackend:
    """PyTorch. Implements `lyra.backends.protocol.ModelBackend` and `SequentialBackend`."""

    name = "torch"
    device = "cpu"
    capabilities = frozenset(
        {"static", "cache", "trace", "reorder", "crop", "grad", "sequential", "bfloat16", "inject", "gates"}
    )

    @property
    def hardware(self) -> str:
        """What it computes on (protocol `PlacedBackend`)."""
        return "CPU" if self.device == "cpu" else torch.cuda.get_device_name(self.device)

    def attention(
        self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], *, dtype: str = "float32"
    ) -> TorchAttention:
        """One attention layer with its weights (Hugging Face names and layouts). Clause DTYPE. Raises InputError."""
        return TorchAttention(spec, weights, dtype, self.device)

    def sequential(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray]) -> TorchSequential:
        """One injected block with its weights (names as in `spec.weight_shapes()`). Raises InputError."""
        from .sequential import TorchSequential  # here, because it is made of a TorchAttention

        return TorchSequential(spec, weights, self.device)

    def load(self, folder: str, *, dtype: str = "float32", device: str | None = None) -> TorchEngine:
        """A whole Gemma-3 from a folder with config.json and *.safetensors. Needs transformers.

        `device` is the backend's own if None. Raises ImportError for a transformers that does not fit, and what
        `TorchEngine.load` raises.
        """
        from .versions import check_transformers

        check_transformers()
        from .model import TorchEngine

        return TorchEngine.load(folder, dtype=dtype, device=self.device if device is None else device)


class CudaBackend(TorchBackend):
    """The same on a CUDA device: `lyra conform --backend lyra.backends.torch_impl:CudaBackend`."""

    name = "torch-cuda"
    device = "cuda"

    def __init__(self) -> None:
        """Raises ImportError where torch sees no such device."""
        if not torch.cuda.is_available():
            raise ImportError("backend 'torch-cuda': this torch sees no CUDA device; take the backend 'torch'")
