"""A .gguf file as a folder in Hugging Face's layout: config.json, model.safetensors, tokenizer.json.

Weights become float32, one block of rows at a time, so a conversion needs little memory whatever the model's size.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lyra.spec.errors import SpecError
from lyra.spec.families import FAMILIES, Family
from lyra.spec.families.gguf import EMBEDDING, GGUF, HEAD, Metadata
from lyra.spec.model import ModelSpec

from .errors import CheckpointError
from .gguf_parts import GGUFModel
from .gguf_tokenizer import build_tokenizer, check_vocabulary, control_ends, tokenizer_config
from .progress import Steps

CONVERTER_VERSION = 2
"""Part of a converted folder's name: raise it whenever the same file would convert to something else."""


def convert(path: Path, folder: Path, progress: Steps | None = None) -> None:
    """Write `folder` (which exists, empty) from the .gguf file, all of its parts if it is split.

    Raises CheckpointError for another architecture, and where metadata or tensors are not those of one model; then
    nothing has been written.
    """
    file = GGUFModel(path)
    report = progress or _silent
    config = hf_config(file)
    check_tensors(file, config)
    report("tokenizer", 0, len(file.tensors))
    tokenizer = build_tokenizer(file)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", tokenizer_config(file.metadata))
    _write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    _write_json(folder / "config.json", config)
    write_weights(file, folder / "model.safetensors", report)


def family_of(file: GGUFModel) -> tuple[Family, GGUF]:
    """Whose file it is, and how that family's files are read. Raises CheckpointError for another architecture."""
    architecture, read = file.metadata.get("general.architecture"), []
    for family in FAMILIES.values():
        if family.gguf is None:
            continue
        if isinstance(architecture, str) and architecture == family.gguf.architecture:
            return family, family.gguf
        read.append(family.gguf.architecture)
    names = " and ".join(map(repr, read))
    raise CheckpointError(f"{file.path} holds the architecture {architecture!r:.100}; Lyra reads {names}")


def hf_config(file: GGUFModel) -> dict[str, Any]:
    """The config.json of a file. Raises CheckpointError, naming what is missing or wrong."""
    metadata = file.metadata
    family, form = family_of(file)
    if EMBEDDING not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor {EMBEDDING}; it is incomplete: download it again")
    check_vocabulary(file)
    return {
        "_name_or_path": _model_name(file),
        "architectures": [family.architecture],
        "model_type": family.text_type,
        "dtype": "float32",
        "vocab_size": file.tensors[EMBEDDING].shape[0],
        **form.config(_metadata(file, form)),
        "tie_word_embeddings": HEAD not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", family.fields["bos_token_id"].default),
        "eos_token_id": _end_tokens(metadata, family.fields["eos_token_id"].default),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id", family.fields["pad_token_id"].default),
    }


def check_tensors(file: GGUFModel, config: Mapping[str, Any]) -> None:
    """The tensors are those of the metadata's model, no more, no fewer, none misshapen. Raises CheckpointError."""
    _, form = family_of(file)
    try:
        shapes = ModelSpec.from_hf_config(config).weight_shapes()
        names = {name: form.hf_name(name) for name in file.tensors}
    except (SpecError, CheckpointError) as refusal:
        text = str(refusal).replace("\n", "; ").replace("ModelSpec.from_hf_config: ", "")
        raise CheckpointError(f"{file.path}: {text}") from None
    for name, info in file.tensors.items():
        if names[name] not in shapes:
            raise CheckpointError(f"{file.path}: tensor {name!r:.100} has no place in a model of its metadata")
        if info.shape != shapes[names[name]]:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has shape {info.shape}; its metadata say {shapes[names[name]]}"
            )
    missing = sorted(set(shapes) - set(names.values()))
    if missing:
        raise CheckpointError(
            f"{file.path}: {len(missing)} tensors of the model are missing, among them {', '.join(missing[:3])}; it is "
            f"incomplete: download it again"
        )


def write_weights(file: GGUFModel, path: Path, report: Steps) -> None:
    """All tensors as float32 in one safetensors file, as the model computes with them (`GGUF.weights`)."""
    _, form = family_of(file)
    order = sorted((form.hf_name(name), name) for name in file.tensors)
    header, offset = {}, 0
    for name, stored in order:
        shape = file.tensors[stored].shape
        size = 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for done, (name, stored) in enumerate(order):
            report(stored, done, len(order))
            for rows in form.weights(name, file.blocks(stored), _metadata(file, form)):
                if not np.isfinite(rows).all():
                    raise CheckpointError(f"{file.path}: tensor {stored!r} holds NaN or infinity; download it again")
                target.write(rows.data)
    report("done", len(order), len(order))


def _metadata(file: GGUFModel, form: GGUF) -> Metadata:
    return Metadata(file.path, file.metadata, form.architecture)


def _model_name(file: GGUFModel) -> str:
    name = file.metadata.get("general.name")
    name = name if isinstance(name, str) and name.strip() else file.path.stem
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def _end_tokens(metadata: Mapping[str, Any], default: int) -> int | list[int]:
    """EOS, and the end of a turn or message, by the file's fields or by the spelling of a control token."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    named = [metadata[key] for key in keys if key in metadata] or [default]
    ends = sorted({*named, *control_ends(metadata)})
    return ends[0] if len(ends) == 1 else ends


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _silent(what: str, done: int, total: int) -> None:
    """No report."""
