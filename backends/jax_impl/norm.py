"""RMSNorm with weight 1 + w, in float32 (clause NORM)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from lyra.spec.array_types import Float

from .dtype import Given, store


def rms_norm(
    x: Float[Array, "*rows D"], weight: Float[Given, " D"], eps: Float[Given, ""] | float
) -> Float[Array, "*rows D"]:
    """x · rsqrt(mean(x²) + eps) · (1 + w) over the last axis, computed in float32 and cast back. Clause NORM.

    x [..., D], weight [D]; returns x's shape and dtype.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * lax.rsqrt(mean_square + eps) * (1.0 + weight.astype(jnp.float32))
    return store(normed, x.dtype)
