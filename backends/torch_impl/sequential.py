"""An injected attention block: norm, attention, norm, and the gate through which it joins the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from lyra.spec.array_types import Float
from lyra.spec.sequential import SequentialSpec

from .layer import Call, Layer, Map, run_layer
from .norm import rms_norm


class Block(NamedTuple):
    """What a block computes with: norms over E (the outer one, if it has one), its attention, and how it joins h.

    gate float32 [], on the device of h.
    """

    input_norm: Map
    attention: Layer
    output_norm: Map | None
    gate: Float[torch.Tensor, ""]
    residual: bool


def block_of(spec: SequentialSpec, layer: Layer, weights: Mapping[str, torch.Tensor]) -> Block:
    """The block of a spec around its attention, with the weights of its norms by name. Clause SEQUENTIAL."""
    norms = {
        name: partial(rms_norm, weight=weights[f"{name}.weight"], eps=spec.norm_eps)
        for name in ("input_norm", "output_norm")
        if f"{name}.weight" in weights
    }
    gate = torch.tensor(spec.gate, dtype=torch.float32, device=weights["input_norm.weight"].device)
    if spec.source == "own":
        layer = reading_only(layer)
    return Block(norms["input_norm"], layer, norms.get("output_norm"), gate, spec.residual)


def reading_only(layer: Layer) -> Layer:
    """The same attention without keys of its own: it reads what its cache holds. Clause SEQUENTIAL-6."""
    return layer._replace(parts=layer.parts._replace(k_proj=None, v_proj=None, k_norm=None))


def run_block(
    h: Float[torch.Tensor, "B T E"], block: Block, call: Call, trace: dict[str, torch.Tensor] | None = None
) -> tuple[Float[torch.Tensor, "B T E"], Any]:
    """The block over the residual stream h [B,T,E]: output [B,T,E] and the live cache. Clause SEQUENTIAL.

    `trace` is given what every stage makes, the attention's output by the name "attention" (SEQUENTIAL-8).
    """
    normed = block.input_norm(h)
    if trace is not None:
        trace["input_norm"] = normed
    y, cache = run_layer(normed, block.attention, call, trace)
    if trace is not None:
        trace["attention"] = trace.pop("output")
    if block.output_norm is not None:
        y = block.output_norm(y)
        if trace is not None:
            trace["output_norm"] = y
    result = join(h, y, block.gate, block.residual)
    if trace is not None:
        trace["output"] = result
    return result, cache


def join(
    h: Float[torch.Tensor, "B T E"], y: Float[torch.Tensor, "B T E"], gate: Float[torch.Tensor, ""], residual: bool
) -> Float[torch.Tensor, "B T E"]:
    """(h if residual else 0) + gate · y, h and y [B,T,E], summed in float32 and rounded once to h's type.

    With the residual a gate of 0 gives h itself, whatever y is, except where the gate is being trained: then the sum is
    formed, so that a gradient reaches it. Clauses SEQUENTIAL-1, SEQUENTIAL-3.
    """
    change = gate.float() * y.float()
    if not residual:
        return change.to(h.dtype)
    opened = (h.float() + change).to(h.dtype)
    return opened if gate.requires_grad and torch.is_grad_enabled() else torch.where(gate == 0, h, opened)
