"""The kinds of damage to a context's file: each makes of a file's bytes another file, drawn by a generator.

And what is done to a file besides: digests formed anew over what is there now, or left out as by an older Lyra.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lyra.spec.digest import digest
from lyra.spec.tensor_file import DTYPES

Rng = np.random.Generator
HUGE = (2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, 10**200)
ODD = (*HUGE, -1, 0, 1, 2, 1.5, 1e308, True, None, "", "5", [], [[]], {}, "\ud800", "\x1b[31m", "[/nope]")
"""Values that stand in no header, or not where they are put."""


class Parts(NamedTuple):
    """A file taken apart: what its header says, and the bytes behind it."""

    header: dict[str, Any]
    data: bytes


def taken_apart(file: bytes) -> Parts:
    (length,) = struct.unpack("<Q", file[:8])
    return Parts(json.loads(file[8 : 8 + length]), file[8 + length :])


def put_together(header: Any, data: bytes) -> bytes:
    return with_text(json.dumps(header).encode("utf-8", "surrogatepass"), data)


def with_text(text: bytes, data: bytes) -> bytes:
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def resealed(file: bytes) -> bytes:
    """The file with digests of what is there, where it can be read so far."""
    try:
        header, data = taken_apart(file)
        metadata = {name: value for name, value in header["__metadata__"].items() if "digest" not in name}
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        digests = {name: digest(data[slice(*entry["data_offsets"])]) for name, entry in entries.items()}
        metadata["digests"] = json.dumps(digests)
        tensors = {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in entries.items()}
        described = {"metadata": metadata, "tensors": tensors}
        metadata["digest"] = digest(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())
        return put_together(header | {"__metadata__": metadata}, data)
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError):
        return file


def older(file: bytes) -> bytes:
    """The file as it was before there were digests."""
    header, data = taken_apart(file)
    metadata = {name: value for name, value in header["__metadata__"].items() if "digest" not in name}
    return put_together(header | {"__metadata__": metadata | {"version": "1"}}, data)


# kinds of damage to the bytes


def start_of_data(file: bytes) -> int:
    return 8 + int(struct.unpack("<Q", file[:8])[0])


def flipped(file: bytes, rng: Rng, begin: int, end: int) -> bytes:
    """One to eight bits flipped between two bytes."""
    damaged = bytearray(file)
    for _ in range(int(rng.choice([1, 1, 2, 8]))):
        if begin < end:
            damaged[int(rng.integers(begin, end))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def flip_in_data(file: bytes, rng: Rng) -> bytes:
    return flipped(file, rng, start_of_data(file), len(file))


def flip_in_header(file: bytes, rng: Rng) -> bytes:
    return flipped(file, rng, 8, start_of_data(file))


def flip_in_length(file: bytes, rng: Rng) -> bytes:
    return flipped(file, rng, 0, 8)


def length_claimed(file: bytes, rng: Rng) -> bytes:
    claim = int(rng.choice([0, 1, 2, 7, 100, len(file) - 9, len(file) - 8, len(file), 10**8, 2**32, 2**62]))
    return struct.pack("<Q", max(claim, 0)) + file[8:]


def cut_short(file: bytes, rng: Rng) -> bytes:
    return file[: int(rng.integers(len(file)))] if rng.random() < 0.7 else file[: -int(rng.integers(1, 9))]


def gone_on(file: bytes, rng: Rng) -> bytes:
    return file + rng.bytes(int(rng.integers(1, 200)))


def inserted(file: bytes, rng: Rng) -> bytes:
    at = int(rng.integers(len(file)))
    return file[:at] + rng.bytes(int(rng.integers(1, 40))) + file[at:]


def deleted(file: bytes, rng: Rng) -> bytes:
    at = int(rng.integers(len(file)))
    return file[:at] + file[at + int(rng.integers(1, 40)) :]


def overwritten(file: bytes, rng: Rng) -> bytes:
    """A page of zeros, of noise, or of another place of the file, as disks that fail leave it."""
    size = min(int(rng.choice([1, 8, 64, 512])), len(file) - 8)
    at, source = (int(rng.integers(8, len(file) - size + 1)) for _ in range(2))
    page = (bytes(size), rng.bytes(size), file[source : source + size])[int(rng.integers(3))]
    return file[:at] + page + file[at + size :]


def exchanged_blocks(file: bytes, rng: Rng) -> bytes:
    start = start_of_data(file)
    size = int(rng.choice([4, 8, 64, 128]))
    if len(file) - start < 2 * size:
        return flip_in_data(file, rng)
    one, other = sorted(start + size * int(at) for at in rng.choice((len(file) - start) // size, 2, replace=False))
    middle = file[one + size : other]
    return file[:one] + file[other : other + size] + middle + file[one : one + size] + file[other + size :]


# kinds of damage to the header


def names(header: dict[str, Any]) -> list[str]:
    return sorted(set(header) - {"__metadata__"})


def picked(values: Any, rng: Rng) -> Any:
    values = list(values)
    return values[int(rng.integers(len(values)))]


def exchanged_entries(file: bytes, rng: Rng) -> bytes:
    """Two tensors of equal shape under each other's names: k and v, or two layers; or any two."""
    header, data = taken_apart(file)
    one = picked(names(header), rng)
    alike = [name for name in names(header) if header[name]["shape"] == header[one]["shape"] and name != one]
    other = picked(alike if alike and rng.random() < 0.8 else names(header), rng)
    header[one], header[other] = header[other], header[one]
    return put_together(header, data)


def exchanged_fields(file: bytes, rng: Rng) -> bytes:
    header, data = taken_apart(file)
    one, other, field = picked(names(header), rng), picked(names(header), rng), picked(header[names(header)[0]], rng)
    header[one][field], header[other][field] = header[other][field], header[one][field]
    return put_together(header, data)


def other_dtype(file: bytes, rng: Rng) -> bytes:
    header, data = taken_apart(file)
    header[picked(names(header), rng)]["dtype"] = picked((*DTYPES, "F64", "F8_E4M3", "U8", "f32", *ODD), rng)
    return put_together(header, data)


def other_shape(file: bytes, rng: Rng) -> bytes:
    """A shape of as many elements, of none, of far too many, or no shape."""
    header, data = taken_apart(file)
    entry = header[picked(names(header), rng)]
    shape = list(entry["shape"])
    match int(rng.integers(6)):
        case 0:
            rng.shuffle(shape)
        case 1:
            shape[int(rng.integers(len(shape)))] = picked(ODD, rng)
        case 2:
            shape = [picked(HUGE, rng), 0, *shape[2:]]
        case 3:
            shape = [int(np.prod(shape))]
        case 4:
            shape = [1] * int(rng.choice([1, 60, 4000])) + shape
        case _:
            shape = picked(ODD, rng)
    entry["shape"] = shape
    return put_together(header, data)


def all_shapes_empty(file: bytes, rng: Rng) -> bytes:
    """Tensors that agree about sizes that no file could hold, times nothing."""
    header, _ = taken_apart(file)
    rows, slots = picked([(picked(HUGE, rng), 0), (0, picked(HUGE, rng)), (0, 0)], rng)
    for name in names(header):
        entry = header[name]
        shape = entry["shape"]
        axes = {1: [0], 2: [rows, slots], 3: [rows, slots, shape[-1]], 4: [rows, shape[1], slots, shape[-1]]}
        entry |= {"shape": axes[len(shape)], "data_offsets": [0, 0]}
    return put_together(header, b"")


def other_offsets(file: bytes, rng: Rng) -> bytes:
    header, data = taken_apart(file)
    offsets = header[picked(names(header), rng)]["data_offsets"]
    match int(rng.integers(4)):
        case 0:
            offsets[int(rng.integers(2))] += int(rng.choice([-64, -8, -1, 1, 8, 64]))
        case 1:
            offsets[int(rng.integers(2))] = picked(ODD, rng)
        case 2:
            offsets.reverse()
        case _:
            offsets.append(picked(ODD, rng))
    return put_together(header, data)


def entry_gone_or_new(file: bytes, rng: Rng) -> bytes:
    header, data = taken_apart(file)
    name = picked((*names(header), "__metadata__"), rng)
    match int(rng.integers(4)):
        case 0:
            del header[name]
        case 1:
            header[picked(("layers.9.k", "layers.1.q", "k", "", "mask ", "\x1b[2J"), rng)] = header[name]
        case 2:
            header[name] = picked(ODD, rng)
        case _:
            header[name]["more"] = "fields"
    return put_together(header, data)


def other_metadata(file: bytes, rng: Rng) -> bytes:
    header, data = taken_apart(file)
    metadata = header["__metadata__"]
    name = picked(metadata, rng)
    text = metadata[name]
    match int(rng.integers(5)):
        case 0:
            del metadata[name]
        case 1:
            metadata[name] = picked(ODD, rng)
        case 2:
            at = int(rng.integers(len(text)))
            metadata[name] = text[:at] + picked('019aZ"[]{}, ', rng) + text[at + 1 :]
        case 3:
            metadata[name] = picked(("[" * 100_000, "NaN", '{"1": [' + "9" * 5000 + "]}", "{}", "[]", "null", "1"), rng)
        case _:
            metadata["note"] = text
    return put_together(header, data)


def inner_value(file: bytes, rng: Rng) -> bytes:
    """One value within the JSON of the fingerprint, the heads or the digests."""
    header, data = taken_apart(file)
    metadata = header["__metadata__"]
    name = picked(sorted({"fingerprint", "kv_heads", "digests"} & set(metadata)), rng)
    whole = json.loads(metadata[name])
    at = whole
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return other_metadata(file, rng)
        key = picked(keys, rng)
        if not isinstance(at[key], dict | list) or rng.random() < 0.2:
            break
        at = at[key]
    old = at[key]
    near = [old + 1, old - 1, old * 2, -old] if type(old) in {int, float} else []
    at[key] = picked((*near, *ODD), rng)
    metadata[name] = json.dumps(whole)
    return put_together(header, data)


def odd_text(file: bytes, rng: Rng) -> bytes:
    """A header that is no JSON, not UTF-8, nested without end, names a key twice, or is only written otherwise."""
    header, data = taken_apart(file)
    text = json.dumps(header)
    twice = f'"{picked(names(header), rng)}": {json.dumps(header[picked(names(header), rng)])}'
    return with_text(
        picked(
            (
                text.replace("{", "{ ", 3).encode() + b" " * 64,
                json.dumps(dict(reversed(header.items())), indent=1).encode(),
                text.encode("utf-16"),
                text.encode() + b"}",
                text.encode().replace(b'"mask"', b'"m\xe4sk"'),
                text[:-1].encode() + b", " + twice.encode() + b"}",
                text[:-1].encode() + b', "deep": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
                text[:-1].encode() + b', "n": NaN}',
                b"[" * 200_000,
                b"",
                b"{}",
                text.encode().replace(b"[0,", b"[-0,", 1),
                text.encode().replace(b", 0]", b", 0.0]"),
            ),
            rng,
        ),
        data,
    )


def other_values(file: bytes, rng: Rng) -> bytes:
    """NaN, infinity, the largest or an odd number in the place of one element of a tensor."""
    header, data = taken_apart(file)
    entry = header[picked(names(header), rng)]
    begin, end = entry["data_offsets"]
    tensor = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).copy()
    if tensor.size == 0:
        return flip_in_header(file, rng)
    at = int(rng.integers(tensor.size))
    if tensor.dtype == np.bool_:
        tensor.view(np.uint8)[at] = int(rng.choice([tensor[at] ^ 1, 2, 255]))
    elif np.issubdtype(tensor.dtype, np.integer):
        limits = np.iinfo(tensor.dtype)
        tensor[at] = int(picked([limits.min, limits.max, -1, 0, 1, 5, min(limits.max, 10**6)], rng))
    else:
        tensor[at] = float(picked([np.nan, np.inf, -np.inf, 3e38, 0.0, -0.0, 1e-45], rng))
    return put_together(header, data[:begin] + tensor.tobytes() + data[end:])


KINDS: tuple[Callable[[bytes, Rng], bytes], ...] = (
    flip_in_data, flip_in_header, flip_in_length, length_claimed, cut_short, gone_on, inserted, deleted, overwritten,
    exchanged_blocks, exchanged_entries, exchanged_fields, other_dtype, other_shape, all_shapes_empty, other_offsets,
    entry_gone_or_new, other_metadata, inner_value, odd_text, other_values,
)  # fmt: skip
