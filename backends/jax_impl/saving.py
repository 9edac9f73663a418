"""From a model back to a folder in Hugging Face's layout, which every backend and Hugging Face itself load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from lyra.spec.errors import InputError
from lyra.spec.families import family_of_config
from lyra.spec.families.family import MODEL
from lyra.spec.files import folder_renamed_into
from lyra.spec.hf_config import text_fields
from lyra.spec.tensor_file import write_tensors

from .decoder import Decoder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
SHARD_BYTES = 5 << 30
"""A file holds about so much at most; more is cut into several files and an index."""


def save_model(module: Decoder, source: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json, the weights and the tokenizer to `folder`; config and tokenizer are those of `source`.

    Of a multimodal `source` the text model is written. The folder is made under another name and renamed. Raises
    InputError where there is one already that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"save: {folder} is there already; give a folder that is not, or that is empty")
    with folder_renamed_into(folder) as made:
        _write_json(made / "config.json", text_config(source, str(module.norm.weight[...].dtype)))
        _write_weights(module, made, shard_bytes)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, made / name)


def text_config(source: Path, dtype: str) -> dict[str, Any]:
    """The config.json of the text model of a folder, for weights in `dtype`."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    family, fields = family_of_config(config), text_fields(config)
    fields.pop("torch_dtype", None)
    return fields | {"model_type": family.text_type, "architectures": [family.architecture], "dtype": dtype}


def checkpoint_name(path: str) -> str:
    """Hugging Face's name of a parameter of the module."""
    return path if path.startswith("lm_head.") else f"{MODEL}{path}"


def _write_weights(module: Decoder, folder: Path, shard_bytes: int) -> None:
    parameters = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    sizes = {name: leaf.nbytes for name, leaf in parameters.items()}
    groups = list(_grouped(sizes, shard_bytes))
    files = [WEIGHTS] if len(groups) == 1 else [_shard_name(number, len(groups)) for number in range(len(groups))]
    places: dict[str, str] = {}
    for file, names in zip(files, groups, strict=True):
        tensors = {checkpoint_name(name): np.asarray(parameters[name]) for name in names}
        write_tensors(folder / file, tensors, {"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    if len(groups) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def _grouped(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Names in their order, each group of `most` bytes at most, or of one name."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
