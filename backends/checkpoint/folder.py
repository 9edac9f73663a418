"""A folder in Hugging Face's layout: its weights are those of its config, no more, no fewer, none misshapen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lyra.spec import families
from lyra.spec.errors import CheckpointError
from lyra.spec.model import ModelSpec

from .config import Config, read_config
from .files import INDEX, WEIGHTS, weight_files, weight_map
from .safetensors_file import DTYPES, StoredTensor, read_table

COMPARED_AT_ONCE = 1 << 24
"""Bytes of a head that are held beside the embedding's at a time."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder that has been checked.

    fields   of the text model's config (`lyra.spec.families.Family.fields`), as given or as transformers fills them in
    spec     what they describe
    tensors  every weight of the text model, by its name in transformers' class of it
    """

    folder: Path
    fields: Mapping[str, Any]
    spec: ModelSpec
    tensors: Mapping[str, StoredTensor]

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and values of every weight, views of the mapped files, in the order of the files.

        Raises CheckpointError for a weight with NaN or infinity in it.
        """
        for name, tensor in self.tensors.items():
            yield name, tensor.array()


def open_checkpoint(folder: Path) -> Checkpoint:
    """The folder, once its config and the tables of its weights are known to fit. Raises CheckpointError.

    Nothing but config.json and headers is read, except where a tied head is stored as well.
    """
    config = read_config(folder)
    shapes = config.spec.weight_shapes()
    held = _held(folder, config, shapes)
    _check_tied_head(config, held)
    for name, tensor in held.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name!r} is stored as {tensor.dtype}; weights are read as "
                f"{', '.join(DTYPES)}"
            )
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name!r} has shape {tensor.shape}; config.json says {shapes[name]}"
            )
    missing = [name for name in shapes if name not in held]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors that config.json asks for are missing, among them "
            f"{', '.join(missing[:3])}; the model is incomplete or another: download or convert it again"
        )
    return Checkpoint(folder, config.fields, config.spec, held)


def _held(folder: Path, config: Config, shapes: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """The tensors of the text model in the folder's files, by their names in it; a head also where it is tied."""
    found: dict[str, StoredTensor] = {}
    family = families.of(config.spec)
    files = weight_files(folder)
    stored = [tensor for path in files for tensor in read_table(path)]
    if files != (folder / WEIGHTS,):
        _check_index(folder, stored)
    for tensor in stored:
        if config.multimodal and family.is_other_part(tensor.name):
            continue
        name = family.text_name(tensor.name)
        if name not in shapes and name != family.names.head:
            raise CheckpointError(_no_place(tensor, config.spec))
        if name in found:
            first = found[name]
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name!r} and {first.name!r} of {first.path.name} are both the model's "
                f"{name}"
            )
        found[name] = tensor
    return found


def _check_index(folder: Path, stored: list[StoredTensor]) -> None:
    """Every tensor that the index names is in the file that it names. Raises CheckpointError."""
    there = {(tensor.name, tensor.path.name) for tensor in stored}
    for name, file in weight_map(folder).items():
        if (name, file) not in there:
            raise CheckpointError(
                f"{folder / INDEX}: weight_map puts {name!r:.100} into {file}, which does not hold it"
            )


def _check_tied_head(config: Config, held: dict[str, StoredTensor]) -> None:
    """Where the config ties the head to the embedding, a head that is stored as well is a copy, and is left out."""
    names = families.of(config.spec).names
    head, embedding = held.get(names.head), held.get(names.embedding)
    if head is None or not config.spec.tie_word_embeddings:
        return
    if embedding is None or not _equal(head, embedding):
        raise CheckpointError(
            f"{head.path}: tensor {head.name!r} is not the embedding, to which config.json ties the head; "
            f"if the model has a head of its own, set tie_word_embeddings to false there"
        )
    del held[names.head]


def _equal(here: StoredTensor, there: StoredTensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if (here.dtype, here.shape) != (there.dtype, there.shape):
        return False
    first, second = (tensor.raw().reshape(-1).view(np.uint8) for tensor in (here, there))
    steps = range(0, len(first), COMPARED_AT_ONCE)
    return all(np.array_equal(first[at : at + COMPARED_AT_ONCE], second[at : at + COMPARED_AT_ONCE]) for at in steps)


def _no_place(tensor: StoredTensor, spec: ModelSpec) -> str:
    bias, head = "with" if spec.attention.bias else "without", "tied" if spec.tie_word_embeddings else "own"
    return (
        f"{tensor.path}: tensor {tensor.name!r:.200} has no place in the model of config.json "
        f"({spec.num_hidden_layers} layers, {bias} attention_bias, {head} head); the weights or the config are another "
        f"model's"
    )
