"""Blends of heads: how far each query head of each layer goes to Lyra, and what many such choices have in common."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .array_types import Float, Int
from .errors import InputError


class LayerRows(NamedTuple):
    """The rows that a layer computes: each comes from row `parents[n]` of the layer before; its blends are float32."""

    parents: Int[np.ndarray, " N"]
    blends: Float[np.ndarray, "N Hq"]


class SharedRows(NamedTuple):
    """Candidates as rows of each blended layer, and the row of the last layer that each candidate ends in."""

    layers: tuple[LayerRows, ...]
    ends: Int[np.ndarray, " candidates"]


def share_rows(blends: Float[np.ndarray, "candidates layers Hq"]) -> SharedRows:
    """Candidates as rows of the layers, each computed once.

    Candidates whose blends are equal up to a layer have the same activations there, so they are one row: a candidate
    that differs from another in its last layer only costs what follows that layer.
    """
    candidates, layers, _ = blends.shape
    rows, before = [], np.zeros(candidates, dtype=np.int64)
    for layer in range(layers):
        here = np.concatenate([before[:, None], blends[:, layer]], axis=1)
        _, first, row = np.unique(here, axis=0, return_index=True, return_inverse=True)
        rows.append(LayerRows(before[first], blends[first, layer].astype(np.float32)))
        before = row.reshape(-1)
    return SharedRows(tuple(rows), before)


def check_blends(blends: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Blends of the shape [...,layers,Hq], each from 0, vanilla, to 1, Lyra, as float64. Raises InputError."""
    blends = np.asarray(blends)
    wanted = blends.shape[-len(shape) :] == shape and np.issubdtype(blends.dtype, np.floating)
    if not wanted or not ((blends >= 0) & (blends <= 1)).all():
        raise InputError(f"blends have shape {blends.shape} and dtype {blends.dtype}; expected numbers 0 to 1, {shape}")
    return blends.astype(np.float64)
