"""The families of models that Lyra runs: what is a family's own stands in its module here, and in one a backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import SpecError
from .config import refusal, shown
from .family import Family, LayerNorms
from .gemma3 import GEMMA3

if TYPE_CHECKING:
    from ..model import ModelSpec

__all__ = ["DEFAULT", "FAMILIES", "Family", "LayerNorms", "family", "family_of_config", "of"]

FAMILIES: Mapping[str, Family] = {known.name: known for known in (GEMMA3,)}
"""All of them, by name."""

DEFAULT = GEMMA3.name
"""What a spec that names no family belongs to: files older than the field are all of this one."""


def family(name: str) -> Family:
    """The family of that name. Raises SpecError with the known ones."""
    if name not in FAMILIES:
        raise SpecError(f"unknown family {shown(name)}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def of(spec: ModelSpec) -> Family:
    """A model's family. Raises SpecError where it has none: a model that is described, and not run."""
    if spec.family is None:
        raise SpecError(f"{spec.name} is described by its spec only; the models Lyra runs are {titles()}")
    return family(spec.family)


def titles() -> str:
    """What people call the families: "Gemma-3 and Llama"."""
    *others, last = [known.title for known in FAMILIES.values()]
    return f"{', '.join(others)} and {last}" if others else last


def model_types() -> tuple[str, ...]:
    """Every `model_type` of a config.json that is read."""
    return tuple(kind for known in FAMILIES.values() for kind in known.model_types)


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, that of a text model or of a multimodal one. Raises SpecError for any other,
    naming its model_type and those that are read."""
    inner = config.get("text_config")
    if inner is None:
        kind = config.get("model_type")
        for known in FAMILIES.values():
            if kind == known.text_type:
                return known
        raise refusal(f"model_type is {shown(kind)}; this reads {_either(model_types())}: give a model of {titles()}")
    if not isinstance(inner, Mapping):
        raise refusal(f"text_config is {shown(inner)}; expected a table of fields")
    multimodal = [known for known in FAMILIES.values() if known.outer_type is not None]
    kinds = [
        (config.get("model_type", known.outer_type), inner.get("model_type", known.text_type)) for known in multimodal
    ]
    for known, found in zip(multimodal, kinds, strict=True):
        if found == (known.outer_type, known.text_type):
            return known
    outer, text = kinds[0]
    read = " or ".join(f"{known.outer_type!r} with a text_config of {known.text_type!r}" for known in multimodal)
    raise refusal(f"model_type is {shown(outer)}, that of text_config {shown(text)}; this reads {read}")


def _either(names: tuple[str, ...]) -> str:
    *others, last = [repr(name) for name in sorted(names)]
    return f"{', '.join(others)} and {last}" if others else last
