"""Cosines and sines of positions, as a context's file holds them (clauses ROPE and STORED-3)."""

from __future__ import annotations

import numpy as np

from .attention import RopeSpec


def rotation_tables(positions: np.ndarray, rope: RopeSpec, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of positions [...], float32 [..., head_dim], computed in float64 and rounded once.

    Both halves of the last axis are equal: element i turns with element i + head_dim / 2 (clauses ROPE, STORED-3).
    """
    angles = np.asarray(positions, dtype=np.float64)[..., None] * rotation_frequencies(rope, head_dim)
    cos, sin = (turn(angles).astype(np.float32) for turn in (np.cos, np.sin))
    return np.concatenate([cos, cos], axis=-1), np.concatenate([sin, sin], axis=-1)


def rotation_frequencies(rope: RopeSpec, head_dim: int) -> np.ndarray:
    """Radians a position by pair, float64 [head_dim / 2] (clause ROPE-2)."""
    frequencies: np.ndarray = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim) / rope.factor
    return frequencies


def angles_in_turn(positions: np.ndarray, rope: RopeSpec, head_dim: int) -> np.ndarray:
    """The angles of positions [...] between -π and π, float32 [..., head_dim / 2].

    Formed in float64 like those of the tables. Cosines of float32 are right to a quarter of the tolerance of a file's
    tables, and cost a fifth of the time, which is that to a first token.
    """
    turns = positions[..., None] * (rotation_frequencies(rope, head_dim) / (2 * np.pi))
    turns -= np.rint(turns)
    return (turns * (2 * np.pi)).astype(np.float32)
