"""What the heads of a model look at, whatever framework runs it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from lyra.backends.protocol import AttentionsEngine, Engine
from lyra.spec.arguments import check_indices
from lyra.spec.context import StaticContext
from lyra.spec.split import HeadSplit

from .errors import ModelError


def looked_at(
    engine: Engine,
    ids: np.ndarray,
    mask: np.ndarray | None,
    layers: Iterable[int] | None,
    context: StaticContext | None,
    splits: Mapping[int, HeadSplit],
    blocks: Collection[int],
) -> dict[int, np.ndarray]:
    """`Model.attentions` for ids [B,T]: by layer, float32 [B,Hq,T,S+T]. Raises InputError, ModelError."""
    if not isinstance(engine, AttentionsEngine):
        raise ModelError(f"attentions: a {type(engine).__name__} does not show what its heads look at")
    if blocks:
        raise ModelError("attentions: blocks read the context, and they are not looked into; take mode='parallel'")
    readers = [layer for layer, split in splits.items() if split.lyra_q_heads]
    requested = (readers or engine.spec.global_layers) if layers is None else check_indices("layers", layers)
    chosen = sorted(set(requested))
    found = engine.attentions(ids, mask, layers=chosen)
    slots = 0 if context is None else context.mask.shape[1]
    return {layer: _with_slots(weights, slots if layer in readers else 0) for layer, weights in found.items()}


def _with_slots(weights: np.ndarray, slots: int) -> np.ndarray:
    """Weights [B,Hq,T,S+T] with the columns of a context of which nothing is visible, where an engine left them out."""
    absent = slots + weights.shape[2] - weights.shape[3]
    return np.pad(weights, ((0, 0), (0, 0), (0, 0), (absent, 0))) if absent else weights
