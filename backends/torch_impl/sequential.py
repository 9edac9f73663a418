"""An injected attention block: norm, attention, norm, and the gate through which it joins the residual stream."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lyra.backends.protocol import Result
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer, check_block_call, check_own_cache, check_weights
from lyra.spec.sequential import SequentialSpec

from .backend import TorchAttention, on
from .cache import LiveCache
from .dtype import leave
from .heads import LyraHeads
from .layer import Call, Weights, attend, output, projection, run
from .norm import rms_norm
from .rope import cos_sin, inverse_frequencies, rotate


class TorchSequential:
    """One injected block in PyTorch, float32: an `Attention` whose x is h. Clause SEQUENTIAL."""

    def __init__(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray], device: str = "cpu") -> None:
        self.spec = spec
        self.device = device
        checked = check_weights(spec, weights)
        self.weights = {name: torch.tensor(value, device=device) for name, value in checked.items()}
        self.attention = TorchAttention(
            spec.attention, {name: checked[name] for name in spec.attention.weight_shapes()}, device=device
        )
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
            if self.spec.source == "own" and call.cache is not None:
                check_own_cache(self.spec.attention, inputs, *call.cache.contents())
            output, live, stages = run_block(self.spec, self.weights, self.attention.lyra, call)
            traced = {name: leave(stages[name]) for name in self.spec.trace_names()} if trace else {}
            return Result(leave(output), live, traced)


def run_block(
    spec: SequentialSpec, weights: Weights, lyra: LyraHeads, call: Call
) -> tuple[torch.Tensor, LiveCache, dict[str, torch.Tensor]]:
    """The block over h = call.x [B,T,E]: output [B,T,E], the live cache, trace. Clause SEQUENTIAL."""
    normed = rms_norm(call.x, weights["input_norm.weight"], spec.norm_eps)
    attention = run_on_own_cache if spec.source == "own" else run
    y, live, stages = attention(spec.attention, weights, lyra, call._replace(x=normed))
    del stages["output"]
    trace = {"input_norm": normed, **stages, "attention": y}
    if spec.output_norm:
        y = trace["output_norm"] = rms_norm(y, weights["output_norm.weight"], spec.norm_eps)
    result = trace["output"] = join(spec, call.x, y)
    return result, live, trace


def run_on_own_cache(
    spec: AttentionSpec, weights: Weights, lyra: LyraHeads, call: Call
) -> tuple[torch.Tensor, LiveCache, dict[str, torch.Tensor]]:
    """The queries of x over the cache that the layer's own attention made, which holds the call's tokens already.

    Returns what `run` does, the cache being the one that was given. Clauses SEQUENTIAL-5 and SEQUENTIAL-6.
    """
    assert call.cache is not None
    trace = {"q_proj": (q := projection(spec, weights, "q_proj", call.x))}
    if spec.qk_norm is not None:
        trace["q_norm"] = q = rms_norm(q, weights["q_norm.weight"], spec.qk_norm.eps)
    if spec.rope is not None:
        cos, sin = cos_sin(call.positions, inverse_frequencies(spec.rope, spec.head_dim))
        trace["q_rope"] = q = rotate(q, cos[:, :, None], sin[:, :, None])
    heads = trace["heads"] = attend(spec, lyra, q, call.cache, call)
    result = trace["output"] = output(weights, heads)
    return result, call.cache, trace


def join(spec: SequentialSpec, h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(h if residual else 0) + gate · y, h and y [B,T,E]; a closed gate gives h itself. Clause SEQUENTIAL-3."""
    change = spec.gate * y
    if not spec.residual:
        return change
    return h + change if spec.gate else h
