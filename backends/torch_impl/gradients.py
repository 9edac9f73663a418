"""Gradients of a layer by autograd, through the code of an ordinary call (clause GRAD)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lyra.backends.protocol import Gradients
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import CallInputs, StaticLayer

from .cache import empty_cache
from .dtype import leave
from .layer import Call, layer_of, numbers_of, run_layer, shape_of
from .static import place_static, rotate_static


def layer_gradients(
    spec: AttentionSpec, weights: Mapping[str, torch.Tensor], inputs: CallInputs, cotangent: np.ndarray
) -> Gradients:
    """Gradients of sum(cotangent · output) of one call without a cache; cotangent [B,T,E], 0 at padding.

    What is masked enters as zeros that nothing flows back through: hidden garbage may overflow in the forward pass,
    and 0 · inf on the way back would be NaN. For x, `run_layer` sees to it.
    """
    x = torch.tensor(inputs.x).requires_grad_()
    learnt = {name: value.detach().requires_grad_() for name, value in weights.items()}
    numbers, kv = numbers_of(spec), list[torch.Tensor]()
    placed = None if inputs.static is None else place_static(spec, inputs.static)
    if inputs.static is not None:
        kv = [torch.tensor(part).requires_grad_() for part in (inputs.static.k, inputs.static.v)]
        shown = torch.tensor(inputs.static.mask)[:, None, :, None]
        k, v = (torch.where(shown, part, 0.0) for part in kv)
        placed = None if placed is None else placed._replace(k=k, v=v)
    layer = layer_of(learnt, numbers, shape_of(spec))
    static = None if placed is None else rotate_static(placed, numbers.frequencies)
    cache = empty_cache(len(x), spec.num_key_value_heads, spec.head_dim)
    call = Call(torch.tensor(inputs.positions), torch.tensor(inputs.mask), static, cache)
    output, _ = run_layer(x, layer, call)
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
