"""One text behind one context, scored under blends of heads: many head splits in one pass, and gradients to the blends.

A blend b mixes a head's output with the context and its output without it, b·with + (1 − b)·without, as in DuoAttention
(Xiao et al. 2024, whose word for it is gate): 1 is a Lyra head, 0 a vanilla one, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lyra.spec.arguments import check_scored
from lyra.spec.blends import check_blends, share_rows
from lyra.spec.errors import InputError
from lyra.spec.inputs import StaticLayer, check_static
from lyra.spec.split import HeadSplit

from . import forward
from .decoder import Decoder, empty_model_cache
from .finite import locate
from .forward import Graph, Structure
from .heads import LyraHeads, lyra_heads
from .layer import Call
from .logits import filled, pieces
from .modules import Attached
from .rope import inverse_frequencies
from .static import StaticKV, place_static, prepare_static
from .tokens import Tokens, pack_left

STEP = 16
"""Texts are padded to a multiple of so many tokens, so that those of about one length share compiled functions."""


class Blended(NamedTuple):
    """One layer under blends: its context, its heads, all of which read it, and blends float32 [N,Hq]."""

    static: StaticKV
    heads: LyraHeads
    blends: Array


class BlendedText:
    """Ids [1,T] behind a context, all heads of whose layers have a blend. Implements the protocol's `BlendedText`.

    What comes before the first of these layers is computed once, here.
    """

    def __init__(self, graph: Graph, tokens: Tokens, scored: int, static: Mapping[int, StaticLayer]) -> None:
        """The last `scored` tokens are scored. Raises InputError for ids, a number or a context that do not fit."""
        scored = check_scored(tokens.ids.shape, scored, len(static))
        self._graph, self._tokens, self._targets = graph, tokens, tokens.ids[0, -scored:]
        self._layers = tuple(sorted(static))
        self._shape = (len(self._layers), graph.spec.num_attention_heads)
        every = graph.spec.attention.replace(split=HeadSplit.all(graph.spec))
        placed = {layer: place_static(every, check_static(every, static[layer], 1), graph.dtype) for layer in static}
        empty = [layer for layer, context in placed.items() if context is None]
        if empty:
            raise InputError(
                f"blended: the context has no slots in layers {empty}; there is nothing to choose heads for"
            )
        self._static = {
            layer: prepare_static(context, inverse_frequencies(every), sharding=graph.sharding)
            for layer, context in placed.items()
            if context is not None
        }
        self._heads = lyra_heads(every)
        packed = pack_left(tokens, -(-tokens.ids.shape[1] // STEP) * STEP)
        self._mask = packed.mask
        self._start = _start(graph.structure, graph.state, packed.ids, packed.mask, stop=self._layers[0])

    def nll(self, blends: np.ndarray) -> np.ndarray:
        """Mean NLL in nats of the scored tokens, float64 [C], under blends [C,L,Hq].

        Raises InputError, and NotFiniteError for NaN or infinity.
        """
        rows = share_rows(check_blends(blends, self._shape))
        hidden, structure, state = self._start, self._graph.structure, self._graph.state
        stops = [*self._layers[1:], self._graph.spec.num_hidden_layers]
        for layer, stop, row in zip(self._layers, stops, rows.layers, strict=True):
            parents, own = filled(row.parents.astype(np.int32)), filled(row.blends)
            blended = {layer: self._blended(layer, own)}
            hidden = _segment(structure, state, hidden, self._mask, parents, blended, start=layer, stop=stop)
        last = np.asarray(hidden[:, -1 - len(self._targets) : -1])
        return self._finite(np.array([self._nll(row) for row in last[: rows.ends.max() + 1]]))[rows.ends]

    def gradient(self, blends: np.ndarray) -> tuple[float, np.ndarray]:
        """The same under blends [L,Hq], and its gradient with respect to them, float64 [L,Hq].

        Raises what `nll` raises.
        """
        wanted = check_blends(blends, self._shape).astype(np.float32)
        blended = {layer: self._blended(layer, row[None]) for layer, row in zip(self._layers, wanted, strict=True)}
        made = _loss_and_gradient(
            self._graph.structure, self._graph.state, self._start, self._mask, self._targets, blended
        )
        nll, found = made
        slopes = np.stack([np.asarray(found[layer][0], np.float64) for layer in self._layers])
        return float(self._finite(np.asarray(nll))), self._finite(slopes)

    def _finite(self, values: np.ndarray) -> np.ndarray:
        """The values. Raises NotFiniteError where one of them is NaN or infinite."""
        if not np.isfinite(values).all():
            raise locate(self._graph, self._tokens, {}, "the scores behind the context")
        return values

    def _blended(self, layer: int, blends: np.ndarray) -> Blended:
        assert self._heads is not None
        return Blended(self._static[layer], self._heads, jnp.asarray(blends))

    def _nll(self, hidden: np.ndarray) -> float:
        """Mean NLL of the targets after hidden [scored,E]."""
        total = 0.0
        for piece in pieces(len(self._targets), self._graph.spec.vocab_size):
            targets = self._targets[piece]
            found = forward.log_probs(self._graph, filled(hidden[piece]), filled(targets))
            total -= float(np.asarray(found)[: len(targets)].sum(dtype=np.float64))
        return total / len(self._targets)


def run_layers(module: Decoder, x: Array, mask: Array, blended: Mapping[int, Blended], start: int, stop: int) -> Array:
    """x [N,T,E] through the layers from `start` to before `stop`, mask [1,T]; all tokens at once, without a cache."""
    batch, width = x.shape[:2]
    rows = jnp.broadcast_to(mask, (batch, width))
    positions = jnp.maximum(jnp.cumsum(rows, axis=1, dtype=jnp.int32) - 1, 0)
    room = empty_model_cache(module.spec, batch, width, module.norm.weight[...].dtype)
    for index in range(start, stop):
        context = blended.get(index)
        attached = None if context is None else Attached(context.static, None, context.heads, context.blends)
        x = module.layers[index](x, Call(positions, rows, None, room.layers[index], first=True), attached, None)[0]
    return module.norm(x) if stop == len(module.layers) else x


@partial(jax.jit, static_argnames=("structure", "stop"))
def _start(structure: Structure, state: Sequence[Array], ids: Array, mask: Array, *, stop: int) -> Array:
    module = structure.merge(state)
    return run_layers(module, module.embed_tokens(ids), mask, {}, 0, stop)


@partial(jax.jit, static_argnames=("structure", "start", "stop"))
def _segment(
    structure: Structure,
    state: Sequence[Array],
    x: Array,
    mask: Array,
    parents: Array,
    blended: Mapping[int, Blended],
    *,
    start: int,
    stop: int,
) -> Array:
    """The layers from a blended one to before the next; row n comes from row parents[n] of what x [N,T,E] holds."""
    return run_layers(structure.merge(state), jnp.take(x, parents, axis=0, mode="clip"), mask, blended, start, stop)


@partial(jax.jit, static_argnames="structure")
def _loss_and_gradient(
    structure: Structure, state: Sequence[Array], x: Array, mask: Array, targets: Array, blended: dict[int, Blended]
) -> tuple[Array, dict[int, Array]]:
    module = structure.merge(state)

    def loss(blends: dict[int, Array]) -> Array:
        under = {layer: context._replace(blends=blends[layer]) for layer, context in blended.items()}
        hidden = run_layers(module, x, mask, under, min(blended), len(module.layers))[0]
        return _mean_nll(module, hidden[-1 - len(targets) : -1], targets)

    made: tuple[Array, dict[int, Array]] = jax.value_and_grad(loss)(
        {layer: context.blends for layer, context in blended.items()}
    )
    return made


def _mean_nll(module: Decoder, hidden: Array, targets: Array) -> Array:
    """Mean NLL of targets [n] after hidden [n,E]; in pieces, whose logits are computed again for the gradient."""

    @jax.checkpoint
    def sum_nll(hidden: Array, targets: Array) -> Array:
        scores = module.logits(hidden)
        chosen = jnp.take_along_axis(scores, targets[:, None], axis=-1, mode="clip")[:, 0]
        return (jax.nn.logsumexp(scores, axis=-1) - chosen).sum()

    parts = pieces(len(targets), module.spec.vocab_size)
    return sum(sum_nll(hidden[part], targets[part]) for part in parts) / len(targets)
