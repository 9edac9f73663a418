"""Rotary position embedding in the half-split layout (clause ROPE)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lyra.spec.array_types import Float, Int, Shaped
from lyra.spec.attention import AttentionSpec

from .dtype import Given, constant, store

LATEST = 1 << 30
"""No position is as late as this."""


def inverse_frequencies(spec: AttentionSpec) -> Float[Given, " {spec.head_dim}//2"] | None:
    """theta^(−2i/D) / factor for pair i: float32 [D/2], rounded once from float64; None where the spec has no RoPE."""
    if spec.rope is None:
        return None
    exponents = np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim
    return constant(spec.rope.theta**-exponents / spec.rope.factor)


def cos_sin(
    positions: Shaped[Given, "*rows"], frequencies: Float[Given, " half"]
) -> tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]:
    """Cosine and sine of position · frequency: positions [...] int, frequencies [D/2]; two float32 [..., D/2].

    Angles are float32 whatever the type of the activations. Clause ROPE-2.
    """
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def turn_once(
    positions: Int[Array, "B T"], frequencies: Float[Given, " half"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """The same as `cos_sin`, computed once for all layers of a compiled model.

    The condition always holds. Without it XLA would compute both anew for every element that any layer rotates.
    """

    def unturned(positions: Array) -> tuple[Array, Array]:
        none = jnp.zeros((*positions.shape, *frequencies.shape), jnp.float32)
        return none, none

    turn: tuple[Array, Array] = lax.cond(
        positions[0, 0] < LATEST, lambda positions: cos_sin(positions, frequencies), unturned, positions
    )
    return turn


def rotate(
    x: Float[Array, "*axes"], cos: Float[Array, "*table"], sin: Float[Array, "*table"], axis: int = -1
) -> Float[Array, "*axes"]:
    """Turn element i together with element i + D/2: x [..., D], cos and sin broadcast to [..., D/2]. Clause ROPE-1.

    `axis` is where D stands in all of them. Computed in float32, rounded to x's type once.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=axis)
    return store(jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=axis), x.dtype)
