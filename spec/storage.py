"""How a context stores keys and values: as float32, as bfloat16, or as int8 with float32 scales (clause STORED).

Unrotated keys have a few channels that are many times larger than the others, the same ones in every token; values have
none. So keys are scaled per channel and values per token, as in KIVI (Liu et al. 2024, arXiv 2402.02750) and KVQuant
(Hooper et al. 2024, arXiv 2401.18079).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, TypeAlias, cast, get_args

import ml_dtypes
import numpy as np

from .arguments import shown
from .errors import ContextError

Storage = Literal["float32", "bfloat16", "int8"]
BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
LEVELS = 127
"""The largest code of an int8: codes are symmetric about 0."""


@dataclass(frozen=True, eq=False)
class Int8:
    """Values [Bc,Hs,S,D] as integers times scales: that of slot s is codes[…, s, :] · scales[…, blocks[s], :].

    codes   [Bc,Hs,S,D] int8
    scales  [Bc,Hs,N,D] float32, one for each channel of a block of slots, or [Bc,Hs,N,1], one for all its channels
    blocks  [Bc,S] int32, the block of every slot, 0 to N-1

    `numpy.asarray` gives the values as float32. Slots keep their block, so that contexts are cut and joined without
    another rounding.
    """

    codes: np.ndarray
    scales: np.ndarray
    blocks: np.ndarray

    def __post_init__(self) -> None:
        """Refuse parts that contradict each other. Raises ContextError."""
        kinds = [part.dtype.name for part in (self.codes, self.scales, self.blocks)]
        if kinds != ["int8", "float32", "int32"]:
            raise ContextError(f"codes, scales and blocks are {kinds}; expected int8, float32 and int32")
        if self.codes.ndim != 4:
            raise ContextError(f"codes have shape {self.codes.shape}; expected [batch, kv_heads, tokens, head_dim]")
        rows, heads, slots, channels = self.codes.shape
        wide = (channels, 1)
        if self.scales.ndim != 4 or self.scales.shape[:2] != (rows, heads) or self.scales.shape[3] not in wide:
            raise ContextError(
                f"scales have shape {self.scales.shape}; expected ({rows}, {heads}, blocks, {channels} or 1)"
            )
        if self.blocks.shape != (rows, slots):
            raise ContextError(f"blocks have shape {self.blocks.shape}; expected {(rows, slots)}")
        if slots and not (self.blocks.min() >= 0 and self.blocks.max() < self.scales.shape[2]):
            raise ContextError(f"blocks are not all among 0 to {self.scales.shape[2] - 1}, those that have scales")

    @property
    def shape(self) -> tuple[int, ...]:
        """(Bc, Hs, S, D)."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and blocks."""
        return self.codes.nbytes + self.scales.nbytes + self.blocks.nbytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("values stored as int8 cannot be had as an array without a copy")
        wide = np.empty(self.shape, np.float32)
        for row, blocks in enumerate(self.blocks):
            for head, scales in enumerate(self.scales[row]):
                np.multiply(self.codes[row, head], scales[blocks], out=wide[row, head])
        return wide if dtype is None else wide.astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> Int8:
        """Some rows, heads and slots, each chosen by a slice, a list or a mask: values[rows, heads, slots]."""
        chosen = (*(key if isinstance(key, tuple) else (key,)), slice(None), slice(None))
        rows, heads, slots = chosen[:3]
        used, blocks = np.unique(self.blocks[rows][:, slots], return_inverse=True)
        return Int8(
            self.codes[rows][:, heads][:, :, slots],
            self.scales[rows][:, heads][:, :, used],
            blocks.reshape(self.blocks[rows][:, slots].shape).astype(np.int32),
        )

    def frozen(self) -> Self:
        """The same, read-only."""
        return type(self)(*(frozen(part) for part in (self.codes, self.scales, self.blocks)))


Values: TypeAlias = np.ndarray | Int8
"""Keys or values [Bc,Hs,S,D] as they are stored: an array of float32 or bfloat16, or Int8."""


class ContextLayer(NamedTuple):
    """One layer's keys and values: k, v [Bc,Hs,S,D], axis Hs being `kv_heads`, ascending.

    float32, or what `StaticContext.astype` has made of it; `numpy.asarray(k, dtype=numpy.float32)` reads any.
    """

    kv_heads: tuple[int, ...]
    k: Values
    v: Values


def check_storage(name: str) -> Storage:
    """What a context is asked to be stored as. Raises ContextError."""
    if not isinstance(name, str) or name not in get_args(Storage):
        raise ContextError(f"dtype is {shown(name)}; a context is stored as one of {', '.join(get_args(Storage))}")
    return cast(Storage, name)


def storage_of(values: Values) -> Storage:
    """What values are stored as. Raises ContextError for another type."""
    return "int8" if isinstance(values, Int8) else check_storage(values.dtype.name)


def stored(values: Values, storage: Storage, mask: np.ndarray, *, by_channel: bool) -> Values:
    """Values [Bc,Hs,S,D] stored in another way; mask [Bc,S]. What they are stored as already comes back as it is.

    To the nearest, ties to even. int8 has one scale a token, or `by_channel` one a channel, over all tokens of a row:
    the largest size divided by 127. Masked slots, which nobody sees, become 0, so that they decide no scale.
    """
    if storage == storage_of(values):
        return values
    if storage == "float32":
        return widened(values)
    shown = np.where(mask[:, None, :, None], np.asarray(values, dtype=np.float32), np.float32(0))
    if storage == "bfloat16":
        with np.errstate(over="ignore"):
            return shown.astype(BFLOAT16)
    scales = np.abs(shown).max(axis=2 if by_channel else 3, keepdims=True, initial=0.0) / np.float32(LEVELS)
    codes = np.rint(shown / np.where(scales > 0, scales, 1)).clip(-LEVELS, LEVELS)
    blocks = np.zeros(mask.shape[1]) if by_channel else np.arange(mask.shape[1])
    return Int8(codes.astype(np.int8), scales, np.tile(blocks.astype(np.int32), (len(mask), 1)))


def widened(values: Values) -> np.ndarray:
    """The values that are stored, as float32: exact for bfloat16, each product rounded once for int8."""
    return np.asarray(values, dtype=np.float32)


def joined(parts: Sequence[Values]) -> Values:
    """Slots of contexts of one row behind each other; no value changes. All parts are stored alike."""
    arrays, narrow = _told_apart(parts)
    if not narrow:
        return np.concatenate(arrays, axis=2)
    starts = np.cumsum([0, *(part.scales.shape[2] for part in narrow)])
    return Int8(
        np.concatenate([part.codes for part in narrow], axis=2),
        np.concatenate([part.scales for part in narrow], axis=2),
        np.concatenate([part.blocks + start for part, start in zip(narrow, starts, strict=False)], axis=1).astype(
            np.int32
        ),
    )


def stacked(parts: Sequence[Values], slots: int) -> Values:
    """Contexts as rows of one batch, zeros behind the shorter ones up to `slots`. All parts are stored alike."""
    arrays, narrow = _told_apart(parts)
    if not narrow:
        return np.concatenate([padded(part, 2, slots) for part in arrays])
    blocks = max(part.scales.shape[2] for part in narrow)
    return Int8(
        np.concatenate([padded(part.codes, 2, slots) for part in narrow]),
        np.concatenate([padded(part.scales, 2, blocks) for part in narrow]),
        np.concatenate([padded(part.blocks, 1, slots) for part in narrow]),
    )


@np.errstate(over="ignore", invalid="ignore")
def infinite(values: Values) -> np.ndarray:
    """Which slots hold NaN or infinity, in any head: bool [Bc,S]."""
    if isinstance(values, Int8):
        bad = ~np.isfinite(values.scales * np.float32(LEVELS)).all(axis=(1, 3))
        return np.take_along_axis(bad, values.blocks.astype(np.intp), axis=1)
    finite: np.ndarray = np.all(np.isfinite(values), axis=(1, 3))
    return ~finite


def padded(array: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Zeros behind the array along an axis, up to a length."""
    return np.pad(array, [(0, length - array.shape[axis] if i == axis else 0) for i in range(array.ndim)])


def frozen(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written through."""
    view = array.view()
    view.flags.writeable = False
    return view


def _told_apart(parts: Sequence[Values]) -> tuple[list[np.ndarray], list[Int8]]:
    """The plain arrays among them and those of int8: of parts that are stored alike, one list is empty."""
    narrow = [part for part in parts if isinstance(part, Int8)]
    return [part for part in parts if isinstance(part, np.ndarray)], narrow


def checked_values(what: str, values: Values, shape: tuple[int, ...]) -> Values:
    """Read-only values of a shape, other floats than bfloat16 as float32. Raises ContextError, `what` in front."""
    values = values if isinstance(values, Int8) else np.asarray(values)
    known = isinstance(values, Int8) or values.dtype == BFLOAT16 or np.issubdtype(values.dtype, np.floating)
    if values.shape != shape or not known:
        kind = "int8" if isinstance(values, Int8) else values.dtype
        raise ContextError(
            f"{what} of shape {values.shape} and dtype {kind}; "
            f"expected float32 {shape}: [batch, kv_heads, tokens, head_dim]"
        )
    if isinstance(values, Int8):
        return values.frozen()
    return frozen(values if values.dtype == BFLOAT16 else values.astype(np.float32, copy=False))
