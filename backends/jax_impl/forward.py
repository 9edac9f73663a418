"""The compiled functions of a whole model. They take a split module, so that they serve every model of its structure.

A cache that goes in is donated: it is used up, and its memory becomes that of the cache that comes out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lyra.spec.model import ModelSpec

from .decoder import Decoder, Forward, ModelCache, empty_model_cache
from .injected import Injected, remembering
from .modules import Attached
from .sharding import ShardingConfig
from .tokens import CHUNK, Packed


class Structure:
    """A module without its parameters, the same object for equal ones, with its hash at hand: compiled functions are
    found by it at every token, and a hash of the whole takes milliseconds. So does taking a module's state apart, which
    is why compiled functions are given its arrays.
    """

    def __init__(self, definition: Any, tree: Any) -> None:
        self.definition, self.tree, self._hash = definition, tree, hash((definition, tree))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and bool(self._parts() == other._parts()))

    def merge(self, state: Sequence[Array]) -> Decoder:
        """The module with these parameters."""
        module: Decoder = nnx.merge(self.definition, jax.tree.unflatten(self.tree, state))
        return module

    def _parts(self) -> tuple[Any, Any]:
        return self.definition, self.tree


class Graph(NamedTuple):
    """A module, split into its structure and its parameters; its spec, the type it computes in, and where it lies."""

    structure: Structure
    state: Sequence[Array]
    spec: ModelSpec
    dtype: np.dtype[Any]
    sharding: ShardingConfig


def split_module(module: Decoder) -> Graph:
    """The module as what compiled functions take."""
    definition, state = nnx.split(module)
    arrays, tree = jax.tree.flatten(state)
    return Graph(_known(definition, tree), arrays, module.spec, module.norm.weight[...].dtype, module.sharding)


def prefill(
    graph: Graph,
    ids: np.ndarray,
    mask: np.ndarray,
    cache: ModelCache,
    attached: Mapping[int, Attached | Injected],
    *,
    capture: tuple[int, ...] = (),
    turned: bool = False,
    first: bool = False,
    watch: bool = False,
) -> Forward:
    """One chunk, ids and mask [B,T], behind what the cache holds; `first` saves work where it is known to be empty."""
    asked = {"capture": capture, "turned": turned, "first": first, "watch": watch}
    made: Forward = _prefill(graph.structure, graph.state, ids, mask, cache, attached, **asked)
    return made


def prefill_all(
    graph: Graph, packed: Packed, attached: Mapping[int, Attached | Injected], room: int = 0, chunk: int = CHUNK
) -> Iterator[tuple[Array, ModelCache]]:
    """All of packed's tokens [B,N], chunk by chunk: hidden [B,T,E] and the cache, with `room` more slots.

    They were packed for this `chunk`.
    """
    batch, width = packed.ids.shape
    cache = open_cache(graph, batch, width + room, remembering(attached))
    for start, stop in chunks(width, chunk):
        part = packed.ids[:, start:stop], packed.mask[:, start:stop]
        hidden, cache, *_ = prefill(graph, *part, cache, attached, first=width <= chunk)
        yield hidden, cache


def next_scores(graph: Graph, hidden: Array) -> Array:
    """The scores of the token after the last column of hidden [B,T,E]: float32 [B,V]."""
    made: Array = _next_scores(graph.structure, graph.state, hidden)
    return made


def decode(
    graph: Graph, token: np.ndarray, cache: ModelCache, attached: Mapping[int, Attached | Injected]
) -> tuple[Array, ModelCache]:
    """Feed token [B] and give the scores of the next one, float32 [B,V]."""
    made: tuple[Array, ModelCache] = _decode(graph.structure, graph.state, token, cache, attached)
    return made


def logits(graph: Graph, hidden: np.ndarray) -> Array:
    """hidden [rows,E] to logits [rows,V]."""
    made: Array = _logits(graph.structure, graph.state, hidden)
    return made


def log_probs(graph: Graph, hidden: np.ndarray, targets: np.ndarray) -> Array:
    """Log-probability of targets [rows] after hidden [rows,E]: float32 [rows]."""
    made: Array = _log_probs(graph.structure, graph.state, hidden, targets)
    return made


def open_cache(graph: Graph, batch: int, tokens: int, blocks: Collection[int] = ()) -> ModelCache:
    """An empty cache on its devices; `blocks` names layers with an injected block that has live keys of its own."""
    cache: ModelCache = graph.sharding.place_cache(empty_model_cache(graph.spec, batch, tokens, graph.dtype, blocks))
    return cache


def chunks(width: int, chunk: int) -> Iterator[tuple[int, int]]:
    """Start and stop of every chunk of `width` columns, a multiple of `chunk` or less than it."""
    return ((start, min(start + chunk, width)) for start in range(0, width, chunk))


_known = lru_cache(maxsize=64)(Structure)


@partial(jax.jit, static_argnames=("structure", "capture", "turned", "first", "watch"), donate_argnames="cache")
def _prefill(
    structure: Structure,
    state: Sequence[Array],
    ids: Array,
    mask: Array,
    cache: ModelCache,
    attached: Mapping[int, Attached | Injected],
    *,
    capture: tuple[int, ...],
    turned: bool,
    first: bool,
    watch: bool,
) -> Forward:
    module = structure.merge(state)
    return module(ids, mask, cache, attached, capture=capture, turned=turned, first=first, watch=watch)


@partial(jax.jit, static_argnames="structure")
def _next_scores(structure: Structure, state: Sequence[Array], hidden: Array) -> Array:
    module = structure.merge(state)
    return module.logits(hidden[:, -1])


@partial(jax.jit, static_argnames="structure", donate_argnames="cache")
def _decode(
    structure: Structure,
    state: Sequence[Array],
    token: Array,
    cache: ModelCache,
    attached: Mapping[int, Attached | Injected],
) -> tuple[Array, ModelCache]:
    module = structure.merge(state)
    made = module(token[:, None], jnp.ones((token.shape[0], 1), bool), cache, attached)
    return module.logits(made.hidden[:, -1]), made.cache


@partial(jax.jit, static_argnames="structure")
def _logits(structure: Structure, state: Sequence[Array], hidden: Array) -> Array:
    module = structure.merge(state)
    return module.logits(hidden)


@partial(jax.jit, static_argnames="structure")
def _log_probs(structure: Structure, state: Sequence[Array], hidden: Array, targets: Array) -> Array:
    scores = structure.merge(state).logits(hidden)
    chosen = jnp.take_along_axis(scores, targets[:, None], axis=-1, mode="clip")[:, 0]
    return chosen - jax.nn.logsumexp(scores, axis=-1)
