"""A .safetensors file, opened once: its header is checked against its length, its tensors are mapped.

The safetensors library opens files by name, for each thing that is asked of it anew. A file that is replaced in between
would give the metadata of one and the tensors of another.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from .errors import ContextError
from .text_file import parse_json

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
}
"""The safetensors dtypes that a context file uses."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype("<f2"): "F16", np.dtype("<f8"): "F64"}

LONGEST_HEADER = 1 << 24
"""Bytes. That of a context of 62 layers takes 60,000."""

EMPTY_AXIS = 1 << 16
"""How long an axis of a tensor without elements may be, which no length of a file bounds."""


class Entry(NamedTuple):
    """What a header says of a tensor: its safetensors dtype, its shape, and where in the data it lies."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile(NamedTuple):
    """A file's metadata, its header's entries by name, and its data: uint8, mapped."""

    metadata: dict[str, str]
    entries: dict[str, Entry]
    data: np.ndarray

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8."""
        entry = self.entries[name]
        return self.data[entry.begin : entry.end]

    def tensor(self, name: str) -> np.ndarray:
        """A tensor, not copied unless the file does not align it. Raises ContextError for bools other than 0 and 1."""
        entry, raw = self.entries[name], self.raw(name)
        if entry.dtype == "BOOL" and raw.size and raw.max() > 1:
            raise ContextError(f"tensor {name!r} is of bools and has the byte {raw.max()}; the file is damaged")
        return np.require(raw.view(DTYPES[entry.dtype]).reshape(entry.shape), requirements="A")


def open_tensors(path: Path) -> TensorFile:
    """Open a file and check its header against its length, before anything is made of the sizes that it claims.

    Raises ContextError for what is no regular file, is cut short or goes on behind its tensors; for tensors that
    overlap, leave gaps, or have another dtype than `DTYPES`; for a header that is not JSON, names a key twice or is
    longer than `LONGEST_HEADER`.
    """
    try:
        with open(path, "rb", opener=_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ContextError("it is no regular file")
            header = _header(file, status.st_size)
            start = file.tell()
            data = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))[start:]
        metadata = _metadata(header.pop("__metadata__", {}))
        entries = {name: _entry(name, fields, len(data)) for name, fields in header.items()}
        _check_layout(entries, len(data))
    except ContextError:
        raise
    except FileNotFoundError:
        raise ContextError("there is no such file") from None
    except OSError as error:
        raise ContextError(f"it cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise ContextError(f"it is no safetensors file, or cut short ({error})") from None
    return TensorFile(metadata, entries, data)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file into `path`, without a copy of what is contiguous. Raises OSError.

    The safetensors library would write to a temporary file of its own, of another mode, which nobody sweeps.
    """
    arrays = {name: np.ascontiguousarray(tensors[name]) for name in tensors}
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": dtype_name(arrays[name].dtype),
            "shape": list(arrays[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(arrays[name].reshape(-1).view(np.uint8).data)


def dtype_name(dtype: np.dtype[Any]) -> str:
    """What safetensors calls a dtype: float32 is F32. Raises KeyError for one that it has no name for."""
    return _NAMES[dtype]


def _at_once(path: str, flags: int) -> int:
    """Opens a file without waiting, as one would for whoever writes to a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _header(file: BinaryIO, size: int) -> dict[str, Any]:
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > size - 8:
        raise ValueError(f"its header claims {length:,} bytes, and {size - 8:,} follow")
    if length > LONGEST_HEADER:
        raise ValueError(f"its header claims {length:,} bytes; expected at most {LONGEST_HEADER:,}")
    return parse_json(file.read(length).decode(), "its header", refuse=ValueError, what="its tensors")


def _metadata(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    return metadata


def _entry(name: str, fields: Any, size: int) -> Entry:
    """One entry of the header, whose numbers fit into so many bytes of data."""
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)} is described by {shown(fields)}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ContextError(f"tensor {shown(name)} has dtype {shown(dtype)}; a context has {', '.join(DTYPES)}")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise ValueError(f"tensor {shown(name)} lies at {shown(offsets)} of {size:,} bytes")
    taken = offsets[1] - offsets[0]
    if not _sizes(shape) or len(shape) > 4 or max(shape, default=0) > max(taken, EMPTY_AXIS):
        raise ValueError(f"tensor {shown(name)} has shape {shown(shape)} in {taken:,} bytes")
    if math.prod(shape) * DTYPES[dtype].itemsize != taken:
        raise ValueError(f"tensor {shown(name)} has shape {shown(shape)} of {dtype} in {taken:,} bytes")
    return Entry(dtype, tuple(shape), *offsets)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(entries: Mapping[str, Entry], size: int) -> None:
    """Tensors lie one behind the other, from the start of the data to its end."""
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != reached:
            raise ValueError(f"tensor {shown(name)} begins at byte {entry.begin:,}, not at {reached:,}")
        reached = entry.end
    if reached != size:
        raise ValueError(f"its tensors end at byte {reached:,} of {size:,}")


def shown(value: Any) -> str:
    """What stands in a file, for a message: as Python writes it, cut to a line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
