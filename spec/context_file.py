"""The context's file: one .safetensors with keys, values, positions, mask and the cosines and sines of the positions.

Tensors: `layers.N.k`, `layers.N.v` [Bc,G,S,D] float32, bfloat16 or int8, the last with `layers.N.k.scales` float32
[Bc,G,blocks,D] or [Bc,G,blocks,1] and `layers.N.k.blocks` [Bc,S] int32, v likewise (clause STORED-4); `mask` [Bc,S]
bool; `positions` and, if known, `tokens` [Bc,S] int64; `cos`, `sin` [Bc,S,D] float32 unless the model has no RoPE.
Metadata: `format`, `version`, `fingerprint` (JSON) and `kv_heads` (JSON, layer -> heads).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .attention import RopeSpec
from .base import renamed_into
from .context import ContextLayer, StaticContext, rotation_frequencies
from .errors import ContextError
from .fingerprint import Fingerprint
from .storage import BFLOAT16, Int8, Values

FORMAT, VERSION = "lyra-context", "1"
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "BF16": BFLOAT16,
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
}
"""The safetensors dtypes that a context file uses."""

INT8_PARTS = ("scales", "blocks")
"""What stands beside the codes of an Int8, under its name and a point."""

TOKENS_AT_ONCE = 1 << 10
"""Tables are checked in pieces of so many tokens: a file is mapped, and its tables are not to be in memory twice."""

TABLE_TOLERANCE = 1e-6
"""How far stored cosines and sines may be from those of the positions: other mathematics libraries round otherwise."""


def write_context(context: StaticContext, path: str | os.PathLike[str]) -> None:
    """Write the file through a temporary name in the same folder. Raises OSError."""
    from safetensors.numpy import save_file

    path = Path(path)
    arrays = {"mask": context.mask, "positions": context.positions}
    if context.tokens is not None:
        arrays["tokens"] = context.tokens
    tables = context.rotation()
    if tables is not None:
        arrays["cos"], arrays["sin"] = tables
    for number, layer in context.layers.items():
        arrays |= _arrays(f"layers.{number}.k", layer.k) | _arrays(f"layers.{number}.v", layer.v)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": context.fingerprint.to_json(),
        "kv_heads": json.dumps(context.kv_heads),
    }
    with renamed_into(path) as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary, metadata)


def read_context(path: str | os.PathLike[str]) -> StaticContext:
    """Read a context file, memory-mapped. Raises ContextError with one message that names the file."""
    path = Path(path)
    try:
        return _read(path)
    except ContextError as error:
        raise ContextError(f"{path}: {error}") from None


def _read(path: Path) -> StaticContext:
    metadata, arrays = _tensors(path)
    if metadata.get("format") != FORMAT:
        raise ContextError("it is a safetensors file, but not a context; make one with Model.capture and save")
    if metadata.get("version") != VERSION:
        raise ContextError(
            f"it has format version {metadata.get('version')!r}, this Lyra reads {VERSION!r}; capture the context "
            f"again or use the Lyra that wrote it"
        )
    kv_heads = _kv_heads(metadata)
    fingerprint = Fingerprint.from_json(metadata.get("fingerprint", ""))
    tables = {"cos", "sin"} if fingerprint.attention.rope is not None else set()
    held = {f"layers.{number}.{part}" for number in kv_heads for part in "kv"}
    narrow = {f"{name}.{part}" for name in held & set(arrays) if arrays[name].dtype == np.int8 for part in INT8_PARTS}
    needed = {"mask", "positions"} | tables | held | narrow
    missing, unknown = sorted(needed - set(arrays)), sorted(set(arrays) - needed - {"tokens"})
    if missing or unknown:
        raise ContextError(f"it lacks the tensors {missing} and has the unknown tensors {unknown}")
    context = StaticContext(
        layers={
            number: ContextLayer(heads, _values(arrays, f"layers.{number}.k"), _values(arrays, f"layers.{number}.v"))
            for number, heads in kv_heads.items()
        },
        mask=arrays["mask"],
        positions=arrays["positions"],
        tokens=arrays.get("tokens"),
        fingerprint=fingerprint,
    )
    _check_tables(context, arrays)
    return context


def _tensors(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the tensors, mapped. safetensors checks the layout first: offsets, sizes, end of file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise ContextError("there is no such file") from None
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise ContextError(f"it is no safetensors file, or cut short ({error})") from None
    metadata = header.pop("__metadata__", {})
    data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    return metadata, {name: _view(data, 8 + length, name, entry) for name, entry in header.items()}


def _view(data: np.ndarray, start: int, name: str, entry: Mapping[str, Any]) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise ContextError(f"tensor {name!r} has dtype {entry['dtype']}; a context has {', '.join(DTYPES)}")
    begin, end = entry["data_offsets"]
    return data[start + begin : start + end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _arrays(name: str, values: Values) -> dict[str, np.ndarray]:
    """The tensors of keys or values: one, or the codes with what stands beside them."""
    if isinstance(values, Int8):
        return {name: values.codes} | {f"{name}.{part}": getattr(values, part) for part in INT8_PARTS}
    return {name: values}


def _values(arrays: Mapping[str, np.ndarray], name: str) -> Values:
    """Keys or values again. Raises ContextError for parts that contradict each other."""
    if arrays[name].dtype != np.int8:
        return arrays[name]
    try:
        return Int8(arrays[name], *(arrays[f"{name}.{part}"] for part in INT8_PARTS))
    except ContextError as error:
        raise ContextError(f"{name}: {error}") from None


def _kv_heads(metadata: Mapping[str, str]) -> dict[int, tuple[int, ...]]:
    try:
        return {int(number): tuple(heads) for number, heads in json.loads(metadata.get("kv_heads", "")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ContextError(f"the list of KV heads is damaged ({error})") from None


def _check_tables(context: StaticContext, arrays: Mapping[str, np.ndarray]) -> None:
    attention = context.fingerprint.attention
    if attention.rope is None:
        return
    shape = (*context.positions.shape, attention.head_dim)
    for name in ("cos", "sin"):
        if arrays[name].shape != shape:
            raise ContextError(f"{name} has shape {arrays[name].shape}; expected {shape}")
    for start in range(0, context.positions.shape[1], TOKENS_AT_ONCE):
        some = slice(start, start + TOKENS_AT_ONCE)
        angles = _angles(context.positions[:, some], attention.rope, attention.head_dim)
        for name, turned in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            halves = arrays[name][:, some].reshape(*turned.shape[:-1], 2, -1)
            if not (np.abs(halves - turned[..., None, :]) <= TABLE_TOLERANCE).all():
                raise ContextError(f"{name} is not that of the positions; the file is damaged")


def _angles(positions: np.ndarray, rope: RopeSpec, head_dim: int) -> np.ndarray:
    """The angles of positions [...] between -π and π, float32 [..., head_dim / 2].

    Formed in float64 like those of the tables. Cosines of float32 are right to a quarter of TABLE_TOLERANCE, and cost a
    fifth of the time, which is that to a first token.
    """
    turns = positions[..., None] * (rotation_frequencies(rope, head_dim) / (2 * np.pi))
    turns -= np.rint(turns)
    return (turns * (2 * np.pi)).astype(np.float32)
