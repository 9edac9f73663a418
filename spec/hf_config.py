"""A config.json as the fields of a ModelSpec: what transformers reads from it, and what it fills in.

Whose config it is says its `model_type`; what its fields are and what they mean says the family (`lyra.spec.families`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .families import family_of_config
from .families.config import read_fields, refusal, shown


def text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the text model: those of `text_config` where the config is that of a multimodal model.

    Whether the head is tied, such a model's own config decides where it says so: transformers writes True into every
    text_config. Raises SpecError for a model of no family that is known.
    """
    if not isinstance(config, Mapping):
        raise refusal(f"expected a table of fields, got {shown(config)}")
    family, inner = family_of_config(config), config.get("text_config")
    if inner is None:
        return dict(config)
    outer = config.get("tie_word_embeddings")
    tied = {} if outer is None else {"tie_word_embeddings": outer}
    return {**inner, "model_type": family.text_type, **tied}


def checked_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of the family's, old ones too, as given or as transformers fills it in. Raises SpecError, naming one.

    A field that may be left out and has no default is None there.
    """
    given = text_fields(config)
    family = family_of_config(config)
    values = read_fields(given, {**family.fields, **family.old_fields})
    family.check_config(values, given)
    return values


def spec_fields(config: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """The fields of the ModelSpec that a config describes. Raises SpecError, naming the field that is wrong."""
    values, family = checked_fields(config), family_of_config(config)
    name = name or text_fields(config).get("_name_or_path") or family.title.lower()
    return {"name": name, "family": family.name, **family.read_config(values)}
