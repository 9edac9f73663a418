"""A linear map, which PyTorch brings along and JAX does not."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from lyra.spec.array_types import Float

from .dtype import Given, store
from .partial import HIGHEST


def linear(
    x: Float[Array, "B T inputs"], weight: Float[Given, "outputs inputs"], bias: Float[Given, " outputs"] | None = None
) -> Float[Array, "B T outputs"]:
    """x · Wᵀ (+ bias): x [B,T,in], W [out,in]; summed in float32, rounded to x's type once (DTYPE-2).

    W stands as Hugging Face has it, which a CPU reads in order when one token is decoded.
    """
    y = jnp.einsum("bti,oi->bto", x, weight, precision=HIGHEST, preferred_element_type=jnp.float32)
    return store(y if bias is None else y + bias, x.dtype)
