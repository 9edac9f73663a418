"""What a family's .gguf files call its tensors and say of its sizes, and a reader of such metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""What every .gguf file calls them; a file without a head ties it to the embedding."""
LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class Metadata:
    """The metadata of a .gguf file under its architecture's name, each of the kind that is asked for.

    All methods raise CheckpointError, naming the file, the field and what was expected.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], architecture: str) -> None:
        self.path, self.metadata, self.architecture = path, metadata, architecture

    def whole(self, key: str, default: int | None = None) -> int:
        """A size, 1 or more; a list with one number for all layers is that number."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a whole number of 1 or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0: the decimal that was meant, 1e-06 and not the nearest float32's 9.999999974752427e-07."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self._wrong(key, value, "a number above 0")
        return float(f"{value:.7g}")

    def number_or_none(self, key: str) -> float | None:
        """A number above 0 that need not be there, such as a softcap; None where it is not."""
        return self.number(key) if f"{self.architecture}.{key}" in self.metadata else None

    def head_dim(self) -> int:
        """The width of a head, keys and values alike."""
        head_dim = self.whole("attention.key_length")
        if self.whole("attention.value_length", head_dim) != head_dim:
            raise CheckpointError(
                f"{self.path}: {self.architecture}.attention.value_length is not attention.key_length, {head_dim}"
            )
        return head_dim

    def layer_types(self, key: str, layers: int, every: int) -> list[str] | None:
        """The kind of every layer where the pattern is a list of which ones slide; None where it is a number, by
        default `every`."""
        value = self._value(key, every)
        if not isinstance(value, np.ndarray):
            return None
        if value.dtype != np.bool_ or len(value) != layers:
            raise self._wrong(key, value.tolist(), f"a number, or true or false for each of {layers} layers")
        return ["sliding_attention" if slides else "full_attention" for slides in value]

    def rope_scaling(self) -> dict[str, Any] | None:
        """The scaling of RoPE, of the global layers where others slide."""
        kind = self.metadata.get(f"{self.architecture}.rope.scaling.type", "none")
        if not isinstance(kind, str):
            raise self._wrong("rope.scaling.type", kind, "a word")
        return None if kind == "none" else {"rope_type": kind, "factor": self.number("rope.scaling.factor")}

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise CheckpointError(
                f"{self.path} lacks the metadata {self.architecture}.{key}; convert or download it again"
            )
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.architecture}.{key} is {value!r:.100}; expected {expected}")


@dataclass(frozen=True, eq=False)
class GGUF:
    """How a family's models stand in .gguf files.

    architecture    what `general.architecture` says, under whose name the metadata stand
    model_tensors   Hugging Face's names of the tensors that a model has once, embedding and head among them
    layer_tensors   those of a layer's, within the layer, without `.weight` and `.bias`: `blk.N.KEY.weight`
    config          the fields of config.json that metadata give
    weights         blocks of rows of a tensor, in order, by Hugging Face's name, from those of the file
    """

    architecture: str
    model_tensors: Mapping[str, str]
    layer_tensors: Mapping[str, str]
    config: Callable[[Metadata], dict[str, Any]]
    weights: Callable[[str, Iterator[np.ndarray], Metadata], Iterator[np.ndarray]]

    def hf_name(self, name: str) -> str:
        """Hugging Face's name of a tensor. Raises CheckpointError for one that such a model does not have."""
        if name in self.model_tensors:
            return self.model_tensors[name]
        found = LAYER_TENSOR.fullmatch(name)
        if found is None or found[2] not in self.layer_tensors:
            raise CheckpointError(f"tensor {name!r} belongs to no model of the architecture {self.architecture!r}")
        return f"model.layers.{found[1]}.{self.layer_tensors[found[2]]}.{found[3]}"
