"""Gradients through a whole model, to its parameters and to the static keys and values of its contexts (clause GRAD).

Pure functions of arrays: `jax.value_and_grad`, `jax.vmap` over contexts and optax apply to them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lyra.spec.attention import StaticSpec
from lyra.spec.context import ContextLayer, StaticContext
from lyra.spec.errors import InputError
from lyra.spec.inputs import StaticLayer, check_static
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from .decoder import empty_model_cache
from .forward import Graph, Structure
from .heads import LyraHeads, lyra_heads
from .modules import Attached
from .rope import inverse_frequencies
from .sharding import CONTEXT, ShardingConfig
from .static import PlacedStatic, place_static, rotate_static
from .tokens import check_tokens
from .visibility import LiveRule, live_rule


class Tunable(NamedTuple):
    """Static keys, normed and unrotated, and values of one layer, to which gradients flow: [Bc,Hs,S,D]."""

    k: Array
    v: Array


class Setting(NamedTuple):
    """What stays as it is while a layer's context is tuned: where its slots sit, which are visible, who reads them."""

    positions: Array
    mask: Array
    frequencies: Array | None
    rule: LiveRule | None
    heads: LyraHeads


Context = dict[int, Tunable]
Settings = dict[int, Setting]


def tunable(
    spec: ModelSpec,
    static: Mapping[int, StaticLayer],
    splits: Mapping[int, HeadSplit],
    mode: StaticSpec | None = None,
    sharding: ShardingConfig | None = None,
) -> tuple[Context, Settings]:
    """Static layers as what is tuned and what stays, by layer; each has slots and Lyra heads.

    `sharding` is that of the model; devices that share the slots have to divide them. Raises InputError.
    """
    sharding = sharding or ShardingConfig.no_sharding()
    context, settings = {}, {}
    for layer, given in static.items():
        own = spec.attention.replace(split=splits[layer], static=mode or StaticSpec())
        placed, heads = place_static(own, check_static(own, given, len(given.k))), lyra_heads(own)
        if placed is None or heads is None:
            raise InputError(f"tunable: layer {layer} has no static slots or no Lyra heads; there is nothing to tune")
        if given.mask.shape[1] % sharding.size(CONTEXT):
            raise InputError(
                f"tunable: layer {layer} has {given.mask.shape[1]} slots for {sharding.size(CONTEXT)} devices to "
                f"share; give a multiple, masked where there is nothing"
            )
        k, v, positions, mask = (sharding.place_slots(part) for part in (*placed[:3], given.mask))
        context[layer] = Tunable(k, v)
        settings[layer] = Setting(positions, mask, inverse_frequencies(own), live_rule(own), heads)
    return context, settings


def attached(context: Context, settings: Settings) -> dict[int, Attached]:
    """Contexts as a model takes them, rotated from stored values; hidden slots are zeros. Clauses STORED, MASKED."""
    return {layer: _attached(static, settings[layer]) for layer, static in context.items()}


def mean_nll(
    structure: Structure, state: Sequence[Array], ids: Array, mask: Array, context: Context, settings: Settings
) -> Array:
    """Mean negative log-likelihood in nats of the real tokens of ids [B,T] but the first of each row: float32 [].

    mask [B,T] bool, False for padding, which is on the left. `structure` and `state` are those of a Graph.
    """
    module = structure.merge(state)
    batch, width = ids.shape
    dtype = module.norm.weight[...].dtype
    cache = empty_model_cache(module.spec, batch, width, dtype)
    made = module(ids, mask, cache, attached(context, settings), first=True)
    scores = module.logits(made.hidden[:, :-1])
    chosen = jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1, mode="clip")[:, :, 0]
    counted = mask[:, :-1]
    nll = jnp.where(counted, jax.nn.logsumexp(scores, axis=-1) - chosen, 0.0)
    return nll.sum() / counted.sum()


def tuned_context(context: StaticContext, found: Context, splits: Mapping[int, HeadSplit]) -> StaticContext:
    """`context`, whose layers `found` were made of, with the keys and values that they have now.

    It is no longer the context of a text, holds no tokens, and is stored as float32. Raises ContextError for NaN and
    infinity.
    """
    context = context.astype("float32")
    layers = {
        layer: _tuned(context.layers[layer], tuned, splits[layer].lyra_kv_heads) for layer, tuned in found.items()
    }
    return replace(context, layers={**context.layers, **layers}, tokens=None)


def loss_and_gradient(
    graph: Graph, ids: np.ndarray, mask: np.ndarray | None, context: Context, settings: Settings
) -> tuple[Array, Context]:
    """`mean_nll` and its gradient with respect to the context; compiled once for a shape. Raises InputError."""
    tokens = check_tokens(ids, mask, graph.spec.vocab_size)
    made: tuple[Array, Context] = _loss_and_gradient(graph.structure, graph.state, *tokens, context, settings)
    return made


@partial(jax.jit, static_argnames="structure")
def _loss_and_gradient(
    structure: Structure, state: Sequence[Array], ids: Array, mask: Array, context: Context, settings: Settings
) -> tuple[Array, Context]:
    made: tuple[Array, Context] = jax.value_and_grad(mean_nll, argnums=4)(
        structure, state, ids, mask, context, settings
    )
    return made


def _tuned(held: ContextLayer, found: Tunable, kv_heads: tuple[int, ...]) -> ContextLayer:
    """A layer of a context with other keys and values for the heads that Lyra's read."""
    heads, arrays = np.searchsorted(held.kv_heads, kv_heads), (np.array(held.k), np.array(held.v))
    for array, part in zip(arrays, found, strict=True):
        array[:, heads] = np.asarray(part)
    return ContextLayer(held.kv_heads, *arrays)


def _attached(context: Tunable, setting: Setting) -> Attached:
    shown = setting.mask[:, None, :, None]
    k, v = (jnp.where(shown, part, 0.0) for part in context)
    placed = PlacedStatic(k, v, setting.positions, setting.mask)
    return Attached(rotate_static(placed, setting.frequencies), setting.rule, setting.heads)
