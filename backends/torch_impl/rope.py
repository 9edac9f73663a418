"""Rotary position embedding in the half-split layout (clause ROPE)."""

from __future__ import annotations

import torch

from lyra.spec.array_types import Float, Int
from lyra.spec.attention import AttentionSpec

from .dtype import store


def inverse_frequencies(spec: AttentionSpec) -> Float[torch.Tensor, " {spec.head_dim}//2"] | None:
    """Radians per position of every pair: theta^(-2i/D) / factor, float64 [D/2]; None without RoPE. Clause ROPE-2."""
    if spec.rope is None:
        return None
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
    return spec.rope.theta**-exponents / spec.rope.factor


def cos_sin(
    positions: Int[torch.Tensor, "*rows"], frequencies: Float[torch.Tensor, " half"]
) -> tuple[Float[torch.Tensor, "*rows half"], Float[torch.Tensor, "*rows half"]]:
    """Cosine and sine of position · frequency, float32 [..., D/2]; positions [...] int, negative ones included.

    The angle is formed in float64 and rounded once at the end: in float32 the error of an angle grows with the
    position, and positions reach 131,072 (clause ROPE-3).
    """
    angles = positions.to(torch.float64)[..., None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(
    x: Float[torch.Tensor, "*rows D"],
    cos: Float[torch.Tensor, "*#rows D//2"],
    sin: Float[torch.Tensor, "*#rows D//2"],
) -> Float[torch.Tensor, "*rows D"]:
    """Turn element i with element i + D/2: x [..., D], cos and sin broadcastable to [..., D/2]. Clause ROPE-1.

    Computed in float32, rounded to x's type once.
    """
    first, second = x.float().chunk(2, dim=-1)
    return store(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1), x.dtype)
