"""The context's file: one .safetensors with keys, values, positions, mask and the cosines and sines of the positions.

Tensors: `layers.N.k`, `layers.N.v` [Bc,Hs,S,D] float32, bfloat16 or int8, the last with `layers.N.k.scales` float32
[Bc,Hs,blocks,D] or [Bc,Hs,blocks,1] and `layers.N.k.blocks` [Bc,S] int32, v likewise (clause STORED-4); `mask` [Bc,S]
bool; `positions` and, if known, `tokens` [Bc,S] int64; `cos`, `sin` [Bc,S,D] float32 unless the model has no RoPE.
Metadata: `format`, `version`, `fingerprint` (JSON), `kv_heads` (JSON, layer -> heads), `digests` (JSON, tensor ->
digest) and `digest` (clause STORED-6; `lyra.spec.digest`). Files of version 1 have neither digests nor digest.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .digest import check_header, check_tensors, sealed
from .errors import ContextError, UncheckedContextWarning
from .files import renamed_into
from .fingerprint import Fingerprint
from .rotation import angles_in_turn
from .storage import ContextLayer, Int8, Values
from .tensor_file import TensorFile, open_tensors, shown, write_tensors
from .text_file import parse_json

if TYPE_CHECKING:
    from .context import StaticContext

FORMAT, VERSION, UNSEALED = "lyra-context", "2", "1"
_LAYER = re.compile("0|[1-9][0-9]{0,8}")

INT8_PARTS = ("scales", "blocks")
"""What stands beside the codes of an Int8, under its name and a point."""

TOKENS_AT_ONCE = 1 << 10
"""Tables are checked in pieces of so many tokens: a file is mapped, and its tables are not to be in memory twice."""

TABLE_TOLERANCE = 1e-6
"""How far stored cosines and sines may be from those of the positions: other mathematics libraries round otherwise."""


class OpenedContext(NamedTuple):
    """A context, the digest that its file has (None in an older one), and whether what is there was held to it."""

    context: StaticContext
    digest: str | None
    checked: bool


def write_context(context: StaticContext, path: str | os.PathLike[str]) -> None:
    """Write the file through a temporary name in the same folder. Raises OSError."""
    arrays = {"mask": context.mask, "positions": context.positions}
    if context.tokens is not None:
        arrays["tokens"] = context.tokens
    tables = context.rotation()
    if tables is not None:
        arrays["cos"], arrays["sin"] = tables
    for number, layer in context.layers.items():
        arrays |= _arrays(f"layers.{number}.k", layer.k) | _arrays(f"layers.{number}.v", layer.v)
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": context.fingerprint.to_json(),
        "kv_heads": json.dumps(context.kv_heads),
    }
    with renamed_into(Path(path)) as temporary:
        write_tensors(temporary, tensors, sealed(metadata, tensors))


def read_context(kind: type[StaticContext], path: str | os.PathLike[str], verify: bool = True) -> OpenedContext:
    """Read a context file, opened once and mapped. Raises ContextError with one message that names the file.

    `kind` is what is made of it: StaticContext, whose `load` this is.

    What is there is held to the digests that the file has, unless `verify` is False. Of an older file, which has none,
    an UncheckedContextWarning says so.
    """
    try:
        path = Path(path)
    except TypeError:
        raise ContextError(f"a context is read from a file; expected its name, got {shown(path)}") from None
    try:
        return _read(kind, path, verify)
    except ContextError as error:
        raise ContextError(f"{path}: {error}") from None


def _read(kind: type[StaticContext], path: Path, verify: bool) -> OpenedContext:
    file = open_tensors(path)
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise ContextError("it is a safetensors file, but not a context; make one with Model.capture and save")
    version = metadata.get("version")
    if version not in {VERSION, UNSEALED}:
        raise ContextError(
            f"it has format version {shown(version)}, this Lyra reads {VERSION!r} and {UNSEALED!r}; capture the context"
            f" again or use the Lyra that wrote it"
        )
    if version == UNSEALED and {"digest", "digests"} & set(metadata):
        raise ContextError("it has digests, which no file of format version '1' has; the file is damaged")
    if verify and version == VERSION:
        check_header(file)
    kv_heads = _kv_heads(metadata)
    fingerprint = Fingerprint.from_json(metadata.get("fingerprint", ""))
    _check_names(file, kv_heads, fingerprint)
    if verify and version == VERSION:
        check_tensors(file)
    arrays = {name: file.tensor(name) for name in file.entries}
    context = kind(
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
    if verify and version == UNSEALED:
        warnings.warn(
            f"{path}: the file is older than digests, so that damage to it would not show; save the context again to "
            f"give it one",
            UncheckedContextWarning,
            stacklevel=4,
        )
    return OpenedContext(context, metadata.get("digest"), verify and version == VERSION)


def _check_names(file: TensorFile, kv_heads: Mapping[int, tuple[int, ...]], fingerprint: Fingerprint) -> None:
    """Refuse a file that lacks a tensor or has another one. Raises ContextError."""
    there = set(file.entries)
    tables = {"cos", "sin"} if fingerprint.attention.rope is not None else set()
    held = {f"layers.{number}.{part}" for number in kv_heads for part in "kv"}
    narrow = {f"{name}.{part}" for name in held & there if file.entries[name].dtype == "I8" for part in INT8_PARTS}
    needed = {"mask", "positions"} | tables | held | narrow
    missing, unknown = sorted(needed - there), sorted(there - needed - {"tokens"})
    if missing or unknown:
        raise ContextError(f"it lacks the tensors {shown(missing)} and has the unknown tensors {shown(unknown)}")


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
    text = metadata.get("kv_heads", "")
    held = parse_json(text, "the list of KV heads", refuse=ContextError, what="heads by layer")
    if not all(_LAYER.fullmatch(number) for number in held):
        raise ContextError(f"the list of KV heads is damaged: expected heads by layer, got {shown(held)}")
    for number, heads in held.items():
        if not isinstance(heads, list) or not all(type(head) is int for head in heads):
            raise ContextError(f"the list of KV heads is damaged: layer {number} has {shown(heads)}")
    return {int(number): tuple(heads) for number, heads in held.items()}


@np.errstate(invalid="ignore")
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
        angles = angles_in_turn(context.positions[:, some], attention.rope, attention.head_dim)
        for name, turned in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            halves = arrays[name][:, some].reshape(*turned.shape[:-1], 2, -1)
            if not (np.abs(halves - turned[..., None, :]) <= TABLE_TOLERANCE).all():
                raise ContextError(f"{name} is not that of the positions; the file is damaged")
