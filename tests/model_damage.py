"""Damaged and odd copies of a model: one change a case, drawn by the case's number, the same on every machine."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lyra.spec.families.gemma3 import FIELDS, OLD_FIELDS

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EXTREMES = (0, 1, 0xFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
NESTED = "[" * 100_000
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 10**9, 10**12, 10**40, 0.0, 1.5, -2.5, float("nan"), float("inf"), "", "x", "gelu",
    "linear", [], {}, [1], [[[]]], ["full_attention"] * 4, {"a": 1}, {"full_attention": None}, {"rope_type": "linear"},
    {"full_attention": {"rope_type": "linear", "factor": 0}}, {"full_attention": {"rope_type": "yarn", "factor": 4.0}},
)  # fmt: skip
ODD_TEXTS = ("", " ", "{", "[]", "null", "1", NESTED, '{"a":' * 5000, "{}", '"text"', '{"model_type": "llama"}')
OTHER_FIELDS = (
    "model_type", "text_config", "quantization_config", "per_layer_config", "partial_rotary_factor", "_name_or_path",
    "dtype", "torch_dtype", "architectures", "id2label", "num_labels", "ignore_mismatched_sizes", "auto_map", "to_dict",
)  # fmt: skip
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")

Change = Callable[[Path, random.Random], str]


def copied(source: Path, target: Path) -> Path:
    """A copy whose files are the source's own until they are replaced."""
    target.mkdir()
    for item in source.iterdir():
        os.link(item, target / item.name)
    return target


def replaced(path: Path, data: bytes) -> None:
    """Write a file anew: a copy's are links."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def read_fields(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_fields(path: Path, fields: Any) -> None:
    replaced(path, json.dumps(fields).encode())


def odd_field(folder: Path, rng: random.Random) -> str:
    """A field of config.json that holds another value, or is left out."""
    fields = read_fields(folder / "config.json")
    name = rng.choice([*FIELDS, *OLD_FIELDS, *FIELDS, *OTHER_FIELDS])
    value = rng.choice(ODD_VALUES)
    if rng.random() < 0.15:
        fields.pop(name, None)
        value = "left out"
    else:
        fields[name] = value
    write_fields(folder / "config.json", fields)
    return f"config.json {name}: {value!r:.60}"


def odd_special_ids(folder: Path, rng: random.Random) -> str:
    """A field of the files that name special tokens."""
    name = rng.choice(JSON_FILES[1:])
    key = rng.choice(["eos_token_id", "bos_token_id", "pad_token_id"] if name.startswith("gen") else ["eos_token"])
    value = rng.choice([*ODD_VALUES, 99_999, [1, 99_999], {"content": 5}, {"content": "<eos>"}, "<nowhere>"])
    write_fields(folder / name, read_fields(folder / name) | {key: value})
    return f"{name} {key}: {value!r:.60}"


def odd_text(folder: Path, rng: random.Random) -> str:
    """A JSON file with other text, or bytes that are no text."""
    path = folder / rng.choice([*JSON_FILES, "tokenizer.json"])
    data = path.read_bytes() if path.exists() else b"{}"
    how = rng.choice(["text", "cut", "flip", "bytes"])
    if how == "text":
        data = rng.choice(ODD_TEXTS).encode()
    elif how == "cut":
        data = data[: rng.randrange(len(data))]
    elif how == "flip":
        at = rng.randrange(len(data))
        data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    else:
        data = b"\xff\xfe" + data
    replaced(path, data)
    return f"{path.name} {how}"


def split_weights(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a safetensors file."""
    (size,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined_weights(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def odd_header(folder: Path, rng: random.Random) -> str:
    """The table of tensors with one entry changed."""
    header, body = split_weights((folder / WEIGHTS).read_bytes())
    name = rng.choice([one for one in header if one != "__metadata__"])
    entry = header[name]
    how = rng.choice(["dtype", "shape", "offsets", "drop", "rename", "extra", "entry"])
    if how == "dtype":
        entry["dtype"] = rng.choice(["F16", "I32", "F8_E4M3", "X9", 5, None, ["F32"]])
    elif how == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice([[0], [-1], [10**12, 10**12], shape[::-1], [*shape, 1], "x", [1.5], None, [True]])
    elif how == "offsets":
        entry["data_offsets"] = rng.choice([[0, 0], [5, 2], [0, 10**15], [-4, 4], [0], None, "x", [0.0, 4.0]])
    elif how == "drop":
        del header[name]
    elif how == "rename":
        new = rng.choice(
            [name.replace("layers.0", "layers.9"), "x", "", "lm_head.weight", name.replace("weight", "bias")]
        )
        header[new] = header.pop(name)
    elif how == "extra":
        new = rng.choice(
            ["model.layers.7.mlp.up_proj.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.bias"]
        )
        header[new] = {"dtype": "F32", "shape": [2], "data_offsets": [len(body), len(body) + 8]}
        body += bytes(8)
    else:
        header[name] = rng.choice(ODD_VALUES)
    replaced(folder / WEIGHTS, joined_weights(header, body))
    return f"{WEIGHTS} {name} {how}"


def odd_bytes(folder: Path, rng: random.Random) -> str:
    """The weights' file cut, lengthened, empty or with other bytes, a NaN among them."""
    data = (folder / WEIGHTS).read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    how = rng.choice(["cut", "longer", "empty", "size", "header", "nan", "infinity"])
    if how == "cut":
        data = data[: rng.randrange(len(data))]
    elif how == "longer":
        data += bytes(rng.randrange(1, 9))
    elif how == "empty":
        data = b""
    elif how == "size":
        data = struct.pack("<Q", rng.choice(EXTREMES)) + data[8:]
    elif how == "header":
        at = 8 + rng.randrange(size)
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    else:
        at = 8 + size + 4 * rng.randrange((len(data) - 8 - size) // 4)
        data = data[:at] + struct.pack("<f", float("nan" if how == "nan" else "-inf")) + data[at + 4 :]
    replaced(folder / WEIGHTS, data)
    return f"{WEIGHTS} {how}"


def odd_index(folder: Path, rng: random.Random) -> str:
    """An index in the place of the one file, right or wrong."""
    header, _ = split_weights((folder / WEIGHTS).read_bytes())
    names = [name for name in header if name != "__metadata__"]
    part = "model-00001-of-00001.safetensors"
    (folder / WEIGHTS).rename(folder / part)
    places: Any = dict.fromkeys(names, part)
    places[rng.choice(names)] = rng.choice(
        [part, "../x.safetensors", "/etc/passwd", "model.bin", "gone.safetensors", 5, None, "a\0.safetensors", "", "."]
    )
    whole = {"metadata": {"total_size": 5}, "weight_map": places}
    index = rng.choice([whole, whole, whole, {"weight_map": []}, {"weight_map": {}}, {}, [], {"weight_map": None}])
    if isinstance(index, dict) and index is whole and rng.random() < 0.3:
        places["model.layers.0.nothing"] = part
    write_fields(folder / INDEX, index)
    return f"{INDEX} {index!r:.60}"


def odd_files(folder: Path, rng: random.Random) -> str:
    """Files that are missing, folders, or not the model's."""
    how = rng.choice(["no weights", "folder", "pickle", "beside", "other name"])
    if how == "beside":
        for name in ("adapter_model.safetensors", "consolidated.safetensors", "book.safetensors", "pytorch_model.bin"):
            (folder / name).write_bytes(b"not the model's")
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "another"}')
        return how
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    if how != "other name":
        (folder / "other.safetensors").unlink()
    if how == "folder":
        (folder / WEIGHTS).mkdir()
    if how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/unpickled'\ntR.")
    return how


CHANGES: tuple[Change, ...] = (
    odd_field, odd_field, odd_field, odd_special_ids, odd_text, odd_header, odd_header, odd_bytes, odd_index, odd_files,
)  # fmt: skip
"""What happens to a folder, the commoner ones more often."""


def damaged_folder(source: Path, target: Path, case: int) -> str:
    """Case number `case` of a damaged copy of `source`, and what was done to it."""
    rng = random.Random(case)
    copied(source, target)
    return rng.choice(CHANGES)(target, rng)


def damaged_gguf(source: bytes, header: int, case: int) -> tuple[bytes, str]:
    """Case number `case` of a damaged .gguf file, whose first `header` bytes are its tables; what was done to it."""
    rng = random.Random(case)
    how = rng.choice(["cut", "flip", "flip", "number", "number", "number", "bytes"])
    at = rng.randrange(4, header) if rng.random() < 0.7 else rng.randrange(4, 900)
    if how == "cut":
        return source[: rng.choice([at, rng.randrange(len(source))])], f"{how} at {at}"
    if how == "flip":
        return source[:at] + bytes([source[at] ^ (1 << rng.randrange(8))]) + source[at + 1 :], f"{how} at {at}"
    if how == "number":
        size, layout = rng.choice([(4, "<I"), (8, "<Q")])
        new = struct.pack(layout, rng.choice(EXTREMES) & ((1 << 8 * size) - 1))
        return source[:at] + new + source[at + size :], f"{how} at {at}: {new!r}"
    new = rng.randbytes(rng.randrange(1, 40))
    return source[:at] + new + source[at + len(new) :], f"{how} at {at}"
