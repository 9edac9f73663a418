"""RMSNorm of queries and keys (clause NORM)."""

from __future__ import annotations

import torch

from lyra.spec.array_types import Float

from .dtype import store


def rms_norm(
    x: Float[torch.Tensor, "*rows D"], weight: Float[torch.Tensor, " D"], eps: float
) -> Float[torch.Tensor, "*rows D"]:
    """x · rsqrt(mean(x²) + eps) · (1 + weight) over the last axis, in float32, cast back to x's type. Clause NORM-1.

    x [..., D]; weight [D].
    """
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return store(wide * inverse_rms * (1.0 + weight.float()), x.dtype)
