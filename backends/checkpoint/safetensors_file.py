"""A .safetensors file, mapped: its table of tensors is checked against the file's length before anything is read.

Opened once; the arrays are views of the mapping, private to this process, so that writing to them changes no file.
"""

from __future__ import annotations

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from lyra.spec.errors import CheckpointError
from lyra.spec.storage import BFLOAT16
from lyra.spec.text_file import parse_json

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
}
"""The types that weights are stored in."""

SIZES = {name: kind.itemsize for name, kind in DTYPES.items()} | {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8,
}  # fmt: skip
"""Bytes of a value, also of the types that parts other than the text model may have."""

LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""

SCANNED_AT_ONCE = 1 << 20
"""Values that are looked through for NaN at a time: as many as stay in a processor's cache, temporaries included."""


class StoredTensor(NamedTuple):
    """A tensor in a file: what it is called there, its type and shape, and its place in the mapping."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: mmap.mmap
    start: int

    def array(self) -> np.ndarray:
        """The values, a view of the mapping. Raises CheckpointError where one is NaN or infinite."""
        values = self.raw()
        if not _finite(values.reshape(-1)):
            raise CheckpointError(
                f"{self.path}: tensor {self.name!r} holds NaN or infinity; the file is damaged, or the training "
                f"diverged: download or convert it again"
            )
        return values

    def raw(self) -> np.ndarray:
        """The values, whatever they are: a view of the mapping, a copy where the file does not align them."""
        kind = DTYPES[self.dtype]
        values = np.frombuffer(self.data, kind, prod(self.shape), self.start).reshape(self.shape)
        return np.require(values, requirements="A")


def read_table(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of a file. Raises CheckpointError for one that is cut short, damaged, or holds no plain weights."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, 2)
            if length < 8:
                raise CheckpointError(_damaged(path, f"it holds {length} bytes"))
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    (size,) = struct.unpack_from("<Q", data)
    if size > min(len(data) - 8, LONGEST_HEADER):
        raise CheckpointError(_damaged(path, f"its header claims {size:,} bytes, the file has {len(data):,}"))
    try:
        text = data[8 : 8 + size].decode("utf-8")
        header = parse_json(text, "its header", refuse=CheckpointError, what="its tensors")
    except (UnicodeDecodeError, CheckpointError) as error:
        raise CheckpointError(_damaged(path, str(error))) from None
    header.pop("__metadata__", None)
    entries = sorted((_entry(path, name, entry) for name, entry in header.items()), key=lambda parts: parts[3:])
    ends, there = [0, *(end for *_, end in entries)], len(data) - 8 - size
    if ends[-1] != there:
        raise CheckpointError(_damaged(path, f"its tensors need {ends[-1]:,} bytes, {there:,} are there"))
    if [begin for *_, begin, _ in entries] != ends[:-1]:
        raise CheckpointError(_damaged(path, "its tensors do not lie one behind the other"))
    return tuple(
        StoredTensor(path, name, dtype, shape, data, 8 + size + begin) for name, dtype, shape, begin, _ in entries
    )


def _entry(path: Path, name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, type, shape, first and last byte of an entry of the table. Raises CheckpointError."""
    odd = f"tensor {name!r:.100} has the entry {entry!r:.100}"
    if not isinstance(entry, dict):
        raise CheckpointError(_damaged(path, odd))
    kind, shape, place = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (_naturals(shape) and _naturals(place) and len(place) == 2 and isinstance(kind, str)):
        raise CheckpointError(_damaged(path, odd))
    if kind not in SIZES:
        raise CheckpointError(f"{path}: tensor {name!r:.100} has the unknown type {kind!r:.100}")
    begin, end = place
    if end - begin != prod(shape) * SIZES[kind]:
        raise CheckpointError(_damaged(path, f"{odd}, and {end - begin:,} bytes"))
    return name, kind, tuple(shape), begin, end


def _naturals(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _damaged(path: Path, how: str) -> str:
    return f"{path} is no safetensors file, or cut short ({how}); copy or download it again"


def _finite(values: np.ndarray) -> bool:
    """Whether all values are finite; at memory speed, because a sum is finite only if all of its terms are.

    The other way round it need not be, so that a sum that is not has its terms looked at.
    """
    for start in range(0, len(values), SCANNED_AT_ONCE):
        part = values[start : start + SCANNED_AT_ONCE]
        if part.dtype == BFLOAT16:
            if ((part.view(np.uint16) & 0x7FFF) >= 0x7F80).any():
                return False
            continue
        with np.errstate(all="ignore"):
            total = part.sum()
        if not np.isfinite(total) and not np.isfinite(part).all():
            return False
    return True
