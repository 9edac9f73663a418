"""Whose context it is: what a context says of the model it was captured from (clause FINGERPRINT)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any

import numpy as np

from .attention import AttentionSpec, StaticSpec
from .bfloat16 import bfloat16_bits
from .errors import ContextError
from .model import ModelSpec
from .tensor_file import shown
from .text_file import parse_json

SPEC_VERSION = 1
"""The version of SPEC.md that this package follows."""

HASHED_WEIGHTS = ("k_norm.weight", "k_proj.bias", "k_proj.weight", "v_proj.bias", "v_proj.weight")
"""The weights that decide a layer's keys and values."""


@dataclass(frozen=True)
class Fingerprint:
    """What decides whether a context fits a model.

    `attention` is the spec of the global layers without a split; `layers` pairs each layer with the hash of its
    k and v projections and k_norm; `tokenizer` is the hash of the vocabulary and `bos` the id of the BOS, both None
    where the model had no tokenizer. `model` is a name for people: two names of one model are no difference.
    """

    model: str
    attention: AttentionSpec
    layers: tuple[tuple[int, str], ...]
    tokenizer: str | None = None
    bos: int | None = None
    spec_version: int = SPEC_VERSION

    @classmethod
    def of(
        cls, spec: ModelSpec, hashes: Mapping[int, str], tokenizer: str | None = None, bos: int | None = None
    ) -> Fingerprint:
        """The fingerprint of a model: `hashes` by layer from `hash_weights`, `tokenizer` from `hash_vocabulary`."""
        attention = spec.attention.replace(split=None, static=StaticSpec())  # neither decides keys and values
        return cls(spec.name, attention, tuple(sorted(hashes.items())), tokenizer, bos)

    def differences(self, other: Fingerprint) -> list[str]:
        """What keeps a context with this fingerprint from fitting a model with the other one; empty if it fits.

        Only this fingerprint's layers are compared, and tokenizers only where both have one.
        """
        found = []
        if self.spec_version != other.spec_version:
            found.append(f"spec version {self.spec_version} against {other.spec_version}")
        for name in type(self.attention).model_fields:
            mine, its = getattr(self.attention, name), getattr(other.attention, name)
            if mine != its:
                found.append(f"{name} {_short(mine)} against {_short(its)}")
        theirs = dict(other.layers)
        absent = [layer for layer, _ in self.layers if layer not in theirs]
        if absent:
            found.append(f"layers {absent} are no global layers there")
        changed = [layer for layer, digest in self.layers if layer in theirs and theirs[layer] != digest]
        if changed:
            found.append(f"the k and v projections or k_norm of layers {changed} differ")
        if self.tokenizer and other.tokenizer and self.tokenizer != other.tokenizer:
            found.append("the tokenizers' vocabularies differ")
        return found

    def restrict(self, layers: Iterable[int]) -> Fingerprint:
        """The fingerprint of some of the layers."""
        keep = set(layers)
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return Fingerprint(**(fields | {"layers": tuple(item for item in self.layers if item[0] in keep)}))

    def to_json(self) -> str:
        """The fingerprint as JSON text."""
        return json.dumps(asdict(self) | {"attention": self.attention.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """The fingerprint that a JSON text holds. Raises ContextError."""
        try:
            fields = _checked_fields(parse_json(text, "its text", refuse=ValueError, what="a fingerprint"))
            attention = AttentionSpec.from_dict(fields["attention"])
        except ValueError as error:
            raise ContextError(f"the fingerprint is damaged ({'; '.join(str(error).splitlines())})") from None
        layers = tuple((layer, digest) for layer, digest in fields["layers"])
        return cls(**(fields | {"attention": attention, "layers": layers}))


def _checked_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a fingerprint, of the types that they have. Raises ValueError, naming the field and what it is."""
    known = {field.name: None if field.default is MISSING else field.default for field in dataclass_fields(Fingerprint)}
    if not {"model", "attention", "layers"} <= set(fields) <= set(known):
        raise ValueError(f"expected the fields {sorted(known)}, got {shown(fields)}")
    fields = known | fields
    layers = fields["layers"]
    right = {
        "model": isinstance(fields["model"], str),
        "tokenizer": fields["tokenizer"] is None or isinstance(fields["tokenizer"], str),
        "bos": fields["bos"] is None or type(fields["bos"]) is int,
        "spec_version": type(fields["spec_version"]) is int,
        "layers": isinstance(layers, list)
        and all(isinstance(item, list) and [type(part) for part in item] == [int, str] for item in layers),
    }
    wrong = [f"{name} is {shown(fields[name])}" for name, fits in right.items() if not fits]
    if wrong:
        raise ValueError("; ".join(wrong))
    return fields


def hash_weights(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over what decides keys and values, each weight rounded to bfloat16 first.

    So a checkpoint has one hash, whether it was loaded in float32 or bfloat16.
    """
    digest = hashlib.sha256()
    for name in HASHED_WEIGHTS:
        if name in weights:
            digest.update(f"{name} {list(weights[name].shape)}".encode())
            digest.update(bfloat16_bits(weights[name]).tobytes())
    return digest.hexdigest()


def hash_vocabulary(vocabulary: Mapping[str, int]) -> str:
    """SHA-256 over the tokens in the order of their ids."""
    ordered = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256("\0".join(f"{index} {token}" for token, index in ordered).encode()).hexdigest()


def _short(value: Any) -> str:
    fields = getattr(type(value), "model_fields", None)
    if fields is None:
        return str(value)
    return "(" + ", ".join(f"{name} {getattr(value, name)}" for name in fields) + ")"
