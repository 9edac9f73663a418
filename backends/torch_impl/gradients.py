"""Gradients of a layer by autograd, through the code of an ordinary call (clause GRAD)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lyra.backends.protocol import Gradients
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import CallInputs, StaticLayer

from .dtype import leave
from .heads import LyraHeads
from .layer import Call, run
from .static import place_static


def layer_gradients(
    spec: AttentionSpec,
    weights: Mapping[str, torch.Tensor],
    lyra: LyraHeads,
    inputs: CallInputs,
    cotangent: np.ndarray,
) -> Gradients:
    """Gradients of sum(cotangent · output) of one call without a cache; cotangent [B,T,E], 0 at padding.

    What is masked enters as zeros that nothing flows back through: hidden garbage may overflow in the forward pass,
    and 0 · inf on the way back would be NaN.
    """
    x = torch.tensor(inputs.x).requires_grad_()
    learnt = {name: value.detach().requires_grad_() for name, value in weights.items()}
    kv: list[torch.Tensor] = []
    prepared = None
    if inputs.static is not None:
        kv = [torch.tensor(part).requires_grad_() for part in (inputs.static.k, inputs.static.v)]
        shown = torch.tensor(inputs.static.mask)[:, None, :, None]
        prepared = place_static(spec, inputs.static, *(torch.where(shown, part, 0.0) for part in kv))
    mask = torch.tensor(inputs.mask)
    real = torch.where(mask[:, :, None], x, 0.0)
    output, _, _ = run(spec, learnt, lyra, Call(real, torch.tensor(inputs.positions), mask, prepared, None))
    leaves = [x, *learnt.values(), *kv]
    found = torch.autograd.grad(output, leaves, torch.tensor(cotangent), materialize_grads=True)
    of_x, *rest = (leave(gradient) for gradient in found)
    of_k, of_v = rest[len(learnt) :] or (None, None)
    return Gradients(of_x, dict(zip(learnt, rest, strict=False)), of_k, of_v)


def complete(found: Gradients, static: StaticLayer | None) -> Gradients:
    """Zeros for a static layer that was given and not read at all."""
    if static is None or found.static_k is not None:
        return found
    zeros = np.zeros(static.k.shape, np.float32)
    return found._replace(static_k=zeros, static_v=zeros.copy())
