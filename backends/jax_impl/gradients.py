"""Gradients of a layer by jax.vjp, through the code of an ordinary call (clause GRAD)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lyra.backends.protocol import Gradients
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import CallInputs, StaticLayer

from .cache import LiveCache, bucket, empty_cache
from .layer import Call, Numbers, Shape, layer_of, run_layer
from .shapes import make_room, pad_slots, pad_tokens
from .static import PlacedStatic, place_static, rotate_static

Pulled = tuple[Array, dict[str, Array], tuple[Array, Array] | None]


def layer_gradients(
    spec: AttentionSpec,
    weights: Mapping[str, Array],
    inputs: CallInputs,
    cotangent: np.ndarray,
    *,
    numbers: Numbers,
    shape: Shape,
) -> Gradients:
    """Gradients of sum(cotangent · output) of one call without a cache; cotangent [B,T,E], 0 at padding.

    Tokens and slots are padded to common numbers on the way in, and the gradients cut back on the way out.
    """
    batch, tokens = inputs.mask.shape
    inputs = pad_tokens(inputs)
    padded = inputs.mask.shape[1]
    placed = None if inputs.static is None else place_static(spec, inputs.static)
    make_room(pull_back)
    of_x, of_weights, of_kv = pull_back(
        np.pad(cotangent, ((0, 0), (0, padded - tokens), (0, 0))),
        inputs.x,
        inputs.positions.astype(np.int32),
        inputs.mask,
        weights,
        numbers if placed is not None else numbers._replace(heads=None),
        None if placed is None else pad_slots(placed),
        empty_cache(batch, shape.kv_heads, shape.head_dim, bucket(padded)),
        shape=shape,
    )
    slots = 0 if inputs.static is None else inputs.static.mask.shape[1]
    of_k, of_v = (None, None) if of_kv is None else (np.asarray(part)[:, :, :slots] for part in of_kv)
    found = {name: np.asarray(gradient) for name, gradient in of_weights.items()}
    return Gradients(np.asarray(of_x)[:, :tokens], found, of_k, of_v)


@partial(jax.jit, static_argnames="shape")
def pull_back(
    cotangent: Array,
    x: Array,
    positions: Array,
    mask: Array,
    weights: Mapping[str, Array],
    numbers: Numbers,
    static: PlacedStatic | None,
    cache: LiveCache,
    *,
    shape: Shape,
) -> Pulled:
    """Gradients of x, of the weights and of the static (k, v), None without; `cache` is empty, with room for the call.

    What is masked enters as zeros that nothing flows back through: hidden garbage may overflow in the forward pass,
    and 0 · inf on the way back would be NaN. For x, `run_layer` sees to it.
    """

    def output(x: Array, weights: Mapping[str, Array], kv: tuple[Array, Array] | None) -> Array:
        rotated = None
        if static is not None and kv is not None:
            assert static.mask is not None  # pad_slots gives every context one
            k, v = (jnp.where(static.mask[:, None, :, None], part, 0.0) for part in kv)
            rotated = rotate_static(static._replace(k=k, v=v), numbers.frequencies)
        call = Call(positions, mask, rotated, cache, first=True)
        return run_layer(x, layer_of(weights, numbers, shape), call)[0]

    kv = None if static is None else (jnp.asarray(static.k), jnp.asarray(static.v))
    _, back = jax.vjp(output, x, weights, kv)
    pulled: Pulled = back(cotangent)
    return pulled


def complete(found: Gradients, static: StaticLayer | None) -> Gradients:
    """Zeros for a static layer that was given and not read at all."""
    if static is None or found.static_k is not None:
        return found
    zeros = np.zeros(static.k.shape, np.float32)
    return found._replace(static_k=zeros, static_v=zeros.copy())
