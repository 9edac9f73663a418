"""Looking for the first layer and token whose numbers are not finite, once a result was not."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lyra.spec.errors import NotFiniteError
from lyra.spec.finite import not_finite

from .forward import Graph, chunks, open_cache, prefill
from .injected import Injected, remembering
from .modules import Attached
from .tokens import CHUNK, Tokens, pack_left


@jax.jit
def finite_rows(values: Array) -> Array:
    """Which rows of values [B,V] hold no NaN and no infinity: bool [B]."""
    return jnp.isfinite(values).all(axis=-1)


def locate(
    graph: Graph,
    tokens: Tokens,
    attached: Mapping[int, Attached | Injected],
    otherwise: str = "the scores",
) -> NotFiniteError:
    """The error of a call that met NaN or infinity for `tokens`: the layer and token that it begins at.

    Runs the model again, with what is attached to it.
    """
    return not_finite(graph.dtype.name, finite_layers(graph, tokens, attached), tokens.mask, otherwise)


def finite_layers(graph: Graph, tokens: Tokens, attached: Mapping[int, Attached | Injected]) -> np.ndarray:
    """Of which tokens the embedding and the output of each layer is finite: bool [L+1,B,T]."""
    packed = pack_left(tokens)
    batch, width = packed.ids.shape
    cache, found = open_cache(graph, batch, width, remembering(attached)), []
    for start, stop in chunks(width, CHUNK):
        part = packed.ids[:, start:stop], packed.mask[:, start:stop]
        made = prefill(graph, *part, cache, attached, first=width <= CHUNK, watch=True)
        cache = made.cache
        found.append(np.asarray(made.finite))
    return np.take_along_axis(np.concatenate(found, axis=2), packed.source[None], axis=2)
