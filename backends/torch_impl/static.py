"""The static context as attention uses it: keys rotated once (clauses STORED and POSITION)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer

from .dtype import enter
from .rope import cos_sin, inverse_frequencies, rotate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


BLOCK = 1 << 18
"""Contexts are taken in by blocks of slots of about this many values, so that attaching needs little memory beside."""


class PreparedStatic(NamedTuple):
    """k (rotated), v [Bc,G,S,D]; visible bool [Bc,S], or None where every slot is; positions int [Bc,S], k's angles.

    group: the processes that hold the other slots of the context, or None where these are all.
    """

    k: torch.Tensor
    v: torch.Tensor
    visible: torch.Tensor | None
    positions: torch.Tensor
    group: ProcessGroup | None = None


def prepare_static(
    spec: AttentionSpec, static: StaticLayer | None, dtype: torch.dtype = torch.float32
) -> PreparedStatic | None:
    """Rotate static keys to where live tokens at t meet them: at j - P for "continue", at j for "overlay".

    Keys and values are rounded to `dtype` first, the rotated keys once more (DTYPE-1). A context shared by all rows
    keeps its visible slots only. None where no slot is visible. `static` must have passed `check_static`. Clauses
    STORED-2, POSITION-1, POSITION-2.
    """
    if static is None or not static.mask.any():
        return None
    rows, groups, slots, head_dim = static.k.shape
    shift, step = _shift(spec, static), max(1, BLOCK // (rows * groups * head_dim))
    blocks = (_entered(spec, _slots(static, start, start + step), dtype, shift) for start in range(0, slots, step))
    if slots <= step:
        return next(blocks)
    kept = int(static.mask.sum()) if rows == 1 else slots
    k = torch.empty(rows, groups, head_dim, kept, dtype=dtype).transpose(-1, -2)
    v = torch.empty(rows, groups, kept, head_dim, dtype=dtype)
    positions = torch.empty(rows, kept, dtype=torch.long)
    end = 0
    for block in blocks:
        start, end = end, end + block.k.shape[2]
        k[:, :, start:end], v[:, :, start:end], positions[:, start:end] = block.k, block.v, block.positions
    visible = None if rows == 1 or static.mask.all() else torch.tensor(static.mask)
    return PreparedStatic(k=k, v=v, visible=visible, positions=positions)


def place_static(spec: AttentionSpec, static: StaticLayer, k: torch.Tensor, v: torch.Tensor) -> PreparedStatic | None:
    """The same from k and v [Bc,G,S,D] of `static` as tensors, through which gradients flow (clause GRAD)."""
    return _placed(spec, static, k, v, _shift(spec, static)) if static.mask.any() else None


def _entered(spec: AttentionSpec, static: StaticLayer, dtype: torch.dtype, shift: np.ndarray) -> PreparedStatic:
    return _placed(spec, static, enter(static.k, dtype), enter(static.v, dtype), shift)


def _placed(
    spec: AttentionSpec, static: StaticLayer, k: torch.Tensor, v: torch.Tensor, shift: np.ndarray
) -> PreparedStatic:
    """k and v of slots of a context, the keys turned to `shift` [Bc,1] before their positions."""
    if len(static.mask) == 1 and not static.mask.all():
        slots = static.mask[0]
        k, v = k[:, :, torch.tensor(slots)], v[:, :, torch.tensor(slots)]
        static = static._replace(mask=static.mask[:, slots], positions=static.positions[:, slots])
    mask, positions = torch.tensor(static.mask), torch.tensor(static.positions)
    if spec.rope is not None:
        cos, sin = cos_sin(positions - torch.tensor(shift), inverse_frequencies(spec.rope, spec.head_dim))
        k = rotate(k, cos[:, None], sin[:, None])
    # Stored [Bc,G,D,S], the layout in which a few queries times many keys run at the speed of memory.
    k = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    return PreparedStatic(k, v, None if static.mask.all() else mask, torch.tensor(static.positions - shift))


def _slots(static: StaticLayer, start: int, end: int) -> StaticLayer:
    """Some of the slots of a context."""
    k, v, mask, positions = static
    return StaticLayer(k[:, :, start:end], v[:, :, start:end], mask[:, start:end], positions[:, start:end])


def _shift(spec: AttentionSpec, static: StaticLayer) -> np.ndarray:
    """How far before their own positions static keys are turned, int [Bc,1]."""
    return past(static) if spec.static.positions == "continue" else np.zeros((len(static.mask), 1), dtype=np.int64)


def past(static: StaticLayer) -> np.ndarray:
    """P of every context row, int [Bc,1]: one more than its highest visible position, 0 if none is visible."""
    return np.where(static.mask, static.positions + 1, 0).max(axis=1, keepdims=True, initial=0)
