"""Reading a .gguf file: its metadata, its table of tensors, and the tensors as float32, a block of rows at a time.

The layout is that of the GGUF specification, version 2 and 3, little-endian. The `gguf` package only dequantises. Every
count and length is held against the file's own before anything is made of it.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lyra.backends.protocol import import_extra

from .errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_AXES = 4
DEEPEST = 4
"""Arrays of metadata within each other; none is known that has two."""
BLOCK_BYTES = 1 << 24
"""Float32 bytes that `GGUFFile.blocks` aims at per block: the memory that a conversion needs, whatever the tensor."""

STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""NumPy dtype of every fixed-size metadata type."""


class TensorInfo(NamedTuple):
    """One entry of the tensor table. shape is slowest axis first; offset and nbytes are in the file."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


class GGUFFile:
    """A memory-mapped .gguf file. `metadata` holds Python values, arrays as lists of str or NumPy arrays."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read metadata and tensor table. Raises CheckpointError for what is no GGUF file, damaged or cut short."""
        self.path = Path(path)
        self._gguf = import_extra("gguf", "gemma-270m")
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < len(MAGIC):
                raise CheckpointError(f"{self.path} is no GGUF file: it holds {file.tell()} bytes")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._data[:4] != MAGIC:
            raise CheckpointError(f"{self.path} is no GGUF file: it starts with {self._data[:4]!r}, not {MAGIC!r}")
        self._at = len(MAGIC)
        try:
            self._read_header()
        except (struct.error, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{self.path} is cut short or damaged in its header ({error}); download it again"
            ) from None
        self._check_places()

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The tensor's rows in order, as float32 blocks [rows, last axis] of about BLOCK_BYTES each."""
        info = self.tensors[name]
        rows, columns = prod(info.shape[:-1]), info.shape[-1]
        raw = np.frombuffer(self._data, dtype=np.uint8, count=info.nbytes, offset=info.offset)
        raw = raw.reshape(rows, info.nbytes // rows)
        kind = self._gguf.GGMLQuantizationType(info.kind)
        if kind.name in {"F32", "F16"}:
            raw = raw.view({"F32": "<f4", "F16": "<f2"}[kind.name])
        step = max(1, BLOCK_BYTES // (4 * columns))
        for start in range(0, rows, step):
            try:
                yield np.ascontiguousarray(self._gguf.dequantize(raw[start : start + step], kind), dtype=np.float32)
            except NotImplementedError:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is stored as {kind.name}, which is not read"
                ) from None

    def tensor(self, name: str) -> np.ndarray:
        """The whole tensor, float32, in its own shape."""
        return np.concatenate(list(self.blocks(name))).reshape(self.tensors[name].shape)

    def _read_header(self) -> None:
        (version,) = self._unpack("<I")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path} is GGUF version {version}; versions {VERSIONS} are read")
        tensor_count, field_count = self._unpack("<QQ")
        self.metadata = {}
        for _ in range(field_count):  # each takes its bytes, so that a count beyond the file ends at its end
            name = self._string()
            if name in self.metadata:
                raise ValueError(f"the metadata {name!r:.100} is there twice")
            self.metadata[name] = self._value(*self._unpack("<I"))
        entries = [self._entry() for _ in range(min(tensor_count, len(self._data)))]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= len(self._data):
            raise ValueError(f"general.alignment is {alignment!r:.100}; expected bytes, such as {DEFAULT_ALIGNMENT}")
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: self._located(name, shape, kind, start + at) for name, shape, kind, at in entries}
        if len(self.tensors) != tensor_count:
            raise ValueError(f"it claims {tensor_count:,} tensors, and {len(self.tensors):,} names are there")

    def _check_places(self) -> None:
        """No tensor reaches beyond the file or into another one."""
        placed = sorted(self.tensors.values(), key=lambda info: info.offset)
        need = max((info.offset + info.nbytes for info in placed), default=0)
        if need > len(self._data):
            raise CheckpointError(
                f"{self.path} is cut short: its tensors need {need:,} bytes, the file has {len(self._data):,}; "
                f"download it again"
            )
        for first, second in pairwise(placed):
            if first.offset + first.nbytes > second.offset:
                raise CheckpointError(
                    f"{self.path} is damaged in its header (the tensors {first.name!r:.100} and {second.name!r:.100} "
                    f"lie over each other); download it again"
                )

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        if length > len(self._data) - self._at:
            raise ValueError(f"a string of {length:,} bytes passes the end of the file")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            item_kind, count = self._unpack("<IQ")
            if depth == DEEPEST:
                raise ValueError(f"arrays stand in each other more than {DEEPEST} deep")
            if item_kind in {STRING, ARRAY}:
                return [self._value(item_kind, depth + 1) for _ in range(count)]
            return self._numbers(item_kind, count)
        return self._numbers(kind, 1)[0].item()

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        if count > (len(self._data) - self._at) // np.dtype(SCALARS[kind]).itemsize:
            raise ValueError(f"an array of {count:,} numbers passes the end of the file")
        if count == 0:
            return np.empty(0, SCALARS[kind])
        values = np.frombuffer(self._data, dtype=SCALARS[kind], count=count, offset=self._at)
        self._at += values.nbytes
        return values

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (axes,) = self._unpack("<I")
        if not 1 <= axes <= MOST_AXES:
            raise ValueError(f"tensor {name!r:.100} has {axes:,} axes; expected 1 to {MOST_AXES}")
        shape = self._unpack(f"<{axes}Q")
        if 0 in shape:
            raise ValueError(f"tensor {name!r:.100} has the shape {tuple(reversed(shape))}; expected no axis of 0")
        kind, offset = self._unpack("<IQ")
        return name, tuple(reversed(shape)), kind, offset

    def _located(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        try:
            block, block_bytes = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType(kind)]
        except (KeyError, ValueError):
            raise CheckpointError(f"{self.path}: tensor {name} has the unknown type {kind}; update gguf") from None
        if shape[-1] % block:
            raise ValueError(f"tensor {name!r:.100} has rows of {shape[-1]:,}; its type is stored in blocks of {block}")
        return TensorInfo(name, shape, kind, offset, prod(shape) // block * block_bytes)
