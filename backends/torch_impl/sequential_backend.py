"""The protocol's injected block: NumPy in, torch inside, NumPy out (clause SEQUENTIAL)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lyra.backends.protocol import Result
from lyra.spec.inputs import StaticLayer, check_block_call, check_own_cache, check_weights
from lyra.spec.sequential import SequentialSpec

from .attention_backend import TorchAttention, on
from .cache import LiveCache
from .dtype import leave
from .sequential import block_of, run_block


class TorchSequential:
    """One injected block in PyTorch, float32: an `Attention` whose x is h. Clause SEQUENTIAL."""

    def __init__(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray], device: str = "cpu") -> None:
        self.spec = spec
        self.device = device
        checked = check_weights(spec, weights)
        inner = {name: checked.pop(name) for name in spec.attention.weight_shapes()}
        self.attention = TorchAttention(spec.attention, inner, device=device)
        outer = {name: torch.tensor(value, device=device) for name, value in checked.items()}
        self.block = block_of(spec, self.attention.layer, outer)
        self.reorder = self.attention.reorder
        self.crop = self.attention.crop

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
        """Run the block over h, x [B,T,E]; with source "own", `cache` is its layer's and holds these tokens already.

        Shapes as in the protocol; raises InputError for inputs that contradict the spec.
        """
        inputs = check_block_call(self.spec, x, positions, mask, static, cache)
        with on(self.device), torch.inference_mode():
            call = self.attention.prepare(inputs, cache)
            if self.spec.source == "own" and isinstance(call.cache, LiveCache):
                check_own_cache(self.spec.attention, inputs, *call.cache.contents())
            stages: dict[str, torch.Tensor] | None = {} if trace else None
            output, live = run_block(torch.tensor(inputs.x), self.block, call, stages)
            names = self.spec.trace_names()
            traced = {name: leave(value) for name, value in (stages or {}).items() if name in names}
            return Result(leave(output), live, traced)
