"""The static context of one layer: keys rotated once, in the layout the attention core reads, and attention to it.

Clauses STORED, POSITION and STATIC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from lyra.spec.array_types import Bool, Float, Int
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer

from .dtype import enter
from .heads import LyraHeads, fold_batch, select, spread, unfold_batch
from .partial import Partial, partial_attention
from .rope import cos_sin, rotate
from .sharding import merge_over, shared_by

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


TILE = 1 << 18
"""Contexts are taken in by tiles of slots of about this many values, so that attaching needs little memory beside."""


class PlacedStatic(NamedTuple):
    """A StaticLayer whose positions are those its keys are to be rotated at.

    k, v [Bc,Hs,S,D], NumPy or, where gradients flow to them, tensors; positions int, mask bool [Bc,S]. NumPy's are
    rounded to `dtype` as they are taken in, which is the caller's memory until then.
    """

    k: np.ndarray | torch.Tensor
    v: np.ndarray | torch.Tensor
    positions: np.ndarray
    mask: np.ndarray
    dtype: torch.dtype = torch.float32


class StaticKV(NamedTuple):
    """Ready to be attended to: keys (rotated), values [Bc,Hs,S,D]; visible bool [Bc,S], or None where every slot is.

    Keys are stored [Bc,Hs,D,S], the layout in which a few queries times many keys run at the speed of memory.
    positions int [Bc,S] are those that the keys are rotated at.
    group: the processes that hold the other slots of the context, or None where these are all.
    """

    keys: Float[torch.Tensor, "Bc Hs S D"]
    values: Float[torch.Tensor, "Bc Hs S D"]
    visible: Bool[torch.Tensor, "Bc S"] | None
    positions: Int[torch.Tensor, "Bc S"]
    group: ProcessGroup | None = None


def place_static(spec: AttentionSpec, static: StaticLayer, dtype: torch.dtype = torch.float32) -> PlacedStatic | None:
    """Where static keys are rotated when live tokens stay at t; None where no slot is visible. Clause POSITION.

    "overlay": at their own position j. "continue": at j − P, which is the same as moving live tokens by P, since RoPE
    is relative; P is one more than the row's highest visible position. `static` must have passed `check_static`.
    """
    if not static.mask.any():
        return None
    positions = static.positions
    if spec.static.positions == "continue":
        positions = positions - np.where(static.mask, positions + 1, 0).max(axis=1, keepdims=True)
    return PlacedStatic(static.k, static.v, positions, static.mask, dtype)


def rotate_static(placed: PlacedStatic, frequencies: Float[torch.Tensor, " half"] | None) -> StaticKV:
    """Rotate static keys from their stored values, which are rounded first. Clause STORED-2, DTYPE-1.

    A context shared by all rows keeps its visible slots only.
    """
    k, v = (enter(part, placed.dtype) if isinstance(part, np.ndarray) else part for part in placed[:2])
    positions, mask = placed.positions, placed.mask
    if len(mask) == 1 and not mask.all():
        slots = mask[0]
        k, v = k[:, :, torch.tensor(slots)], v[:, :, torch.tensor(slots)]
        positions, mask = positions[:, slots], mask[:, slots]
    visible, places = torch.tensor(mask), torch.tensor(positions)
    if frequencies is not None:
        cos, sin = cos_sin(places, frequencies)
        k = rotate(k, cos[:, None], sin[:, None])
    k = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    return StaticKV(k, v, None if mask.all() else visible, places)


def prepare_static(placed: PlacedStatic, frequencies: Float[torch.Tensor, " half"] | None) -> StaticKV:
    """The same a tile of slots at a time, so that little of a context is in memory twice."""
    rows, heads, slots, head_dim = placed.k.shape
    step = max(1, TILE // (rows * heads * head_dim))
    tiles = (rotate_static(_slots(placed, start, start + step), frequencies) for start in range(0, slots, step))
    if slots <= step:
        return next(tiles)
    kept = int(placed.mask.sum()) if rows == 1 else slots
    keys = torch.empty(rows, heads, head_dim, kept, dtype=placed.dtype).transpose(-1, -2)
    values = torch.empty(rows, heads, kept, head_dim, dtype=placed.dtype)
    positions = torch.empty(rows, kept, dtype=torch.long)
    end = 0
    for tile in tiles:
        start, end = end, end + tile.keys.shape[2]
        keys[:, :, start:end], values[:, :, start:end] = tile.keys, tile.values
        positions[:, start:end] = tile.positions
    visible = None if rows == 1 or placed.mask.all() else torch.tensor(placed.mask)
    return StaticKV(keys, values, visible, positions)


def static_attention(
    queries: Float[torch.Tensor, "B Hkv R T D"],
    static: StaticKV,
    heads: LyraHeads,
    scale: float,
    softcap: float | None,
) -> Partial:
    """Attention of the Lyra heads to the static keys; empty for vanilla heads. Clauses STATIC-2, STATIC-3, SPLIT-4.

    queries [B,Hkv,R,T,D], folded; gives a Partial of the same axes. Each context is read once for all rows that share
    it (clause BATCH-4). Where other processes hold other slots, the result is over the slots of all.
    """
    queries = select(queries, heads)
    if static.group is not None:
        queries = shared_by(queries, static.group)
    visible = None if static.visible is None else static.visible[:, None, None, None, :]
    folded = fold_batch(queries, len(static.keys))
    part = partial_attention(folded, static.keys, static.values, visible, scale, softcap)
    part = Partial(*(unfold_batch(field, queries.shape[2]) for field in part))
    if static.group is not None:
        part = merge_over(part, static.group)
    return spread(part, heads)


def shard(static: StaticKV, group: ProcessGroup) -> StaticKV:
    """This process's stretch of the slots, about S / processes of them, copied so that the others can be freed.

    Where there are fewer slots than processes, one that is left without gets a slot that nothing sees. `static` is the
    whole context, the same in every process: a slot is rotated relative to the last one of all, wherever it is held.
    """
    slots, rank, ranks = static.keys.shape[2], dist.get_rank(group), dist.get_world_size(group)
    start, end = slots * rank // ranks, slots * (rank + 1) // ranks
    own = slice(start, end) if start < end else slice(0, 1)
    visible = torch.ones(len(static.keys), slots, dtype=torch.bool) if static.visible is None else static.visible
    visible = visible[:, own] & (start < end)
    keys = static.keys[:, :, own].transpose(-1, -2).clone(memory_format=torch.contiguous_format).transpose(-1, -2)
    values = static.values[:, :, own].clone(memory_format=torch.contiguous_format)
    return StaticKV(keys, values, None if visible.all() else visible, static.positions[:, own], group)


def _slots(placed: PlacedStatic, start: int, end: int) -> PlacedStatic:
    """Some of the slots of a context."""
    k, v, positions, mask, dtype = placed
    return PlacedStatic(k[:, :, start:end], v[:, :, start:end], positions[:, start:end], mask[:, start:end], dtype)
