"""Contexts that are tuned: keys and values are parameters of attention modules, and come back as a context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lyra.spec.context import ContextLayer, StaticContext

from .split_projections import TUNED


def tuned_context(context: StaticContext, modules: Mapping[int, Any]) -> StaticContext:
    """`context`, which the modules of its layers attend to, with the keys and values that they have now.

    Where any is trainable it is no longer the context of a text, holds no tokens, and is stored as float32. Raises
    ContextError for NaN and infinity.
    """
    tuned = {layer: _tuned(context, layer, module) for layer, module in modules.items() if module.static_trainable}
    if not tuned:
        return context
    context = context.astype("float32")
    return replace(context, layers={**context.layers, **tuned}, tokens=None)


def _tuned(context: StaticContext, layer: int, module: Any) -> ContextLayer:
    """A layer of the context, with the values of the module's parameters for Lyra's heads and the slots they see."""
    held = context.layers[layer]
    every = np.arange(context.mask.shape[1])
    slots = every[context.mask[0]] if context.batch == 1 else every
    heads = np.searchsorted(held.kv_heads, module.spec.lyra_kv_heads)
    place = np.ix_(np.arange(context.batch), heads, slots)
    arrays = np.array(held.k, dtype=np.float32), np.array(held.v, dtype=np.float32)
    for name, array in zip(TUNED, arrays, strict=True):
        array[place] = getattr(module, name).detach().float().cpu().numpy()
    return ContextLayer(held.kv_heads, *arrays)
