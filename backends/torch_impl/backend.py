"""PyTorch as a backend: what it offers, the devices it computes on, and how it loads a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from lyra.spec.attention import AttentionSpec
from lyra.spec.sequential import SequentialSpec

from .attention_backend import TorchAttention
from .sequential_backend import TorchSequential

if TYPE_CHECKING:
    from .model import TorchEngine


class TorchBackend:
    """PyTorch. Implements `lyra.backends.protocol.ModelBackend` and `SequentialBackend`."""

    name = "torch"
    device = "cpu"
    capabilities = frozenset(
        {"static", "cache", "trace", "reorder", "crop", "grad", "sequential", "bfloat16", "inject", "blends"}
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
        return TorchSequential(spec, weights, self.device)

    def load(self, folder: str, *, dtype: str = "float32", device: str | None = None) -> TorchEngine:
        """A whole model from a folder with config.json and *.safetensors. Needs transformers.

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
