"""Gates of heads: how far each query head of each layer goes to Lyra, and what many such choices have in common."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .errors import InputError


class LayerRows(NamedTuple):
    """The rows that a layer computes: each comes from row `parents[n]` of the layer before; gates float32 [N,Hq]."""

    parents: np.ndarray
    gates: np.ndarray


class SharedRows(NamedTuple):
    """Candidates as rows of each gated layer, and the row int [C] of the last layer that each candidate ends in."""

    layers: tuple[LayerRows, ...]
    ends: np.ndarray


def share_rows(gates: np.ndarray) -> SharedRows:
    """Candidates, gates [C,L,Hq], as rows of L layers, each computed once.

    Candidates whose gates are equal up to a layer have the same activations there, so they are one row: a candidate
    that differs from another in its last layer only costs what follows that layer.
    """
    candidates, layers, _ = gates.shape
    rows, before = [], np.zeros(candidates, dtype=np.int64)
    for layer in range(layers):
        here = np.concatenate([before[:, None], gates[:, layer]], axis=1)
        _, first, own = np.unique(here, axis=0, return_index=True, return_inverse=True)
        rows.append(LayerRows(before[first], gates[first, layer].astype(np.float32)))
        before = own.reshape(-1)
    return SharedRows(tuple(rows), before)


def check_gates(gates: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Gates of the shape [...,L,Hq], each from 0, vanilla, to 1, Lyra, as float64. Raises InputError."""
    gates = np.asarray(gates)
    wanted = gates.shape[-len(shape) :] == shape and np.issubdtype(gates.dtype, np.floating)
    if not wanted or not ((gates >= 0) & (gates <= 1)).all():
        raise InputError(f"gates have shape {gates.shape} and dtype {gates.dtype}; expected numbers 0 to 1, {shape}")
    return gates.astype(np.float64)
