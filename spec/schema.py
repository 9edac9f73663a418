"""JSON Schema of what the spec's TOML and JSON files hold: for editors, and for programs that write such files.

What a schema cannot say (heads that divide, a split that cuts a group) only building the object says.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema
from pydantic_core import core_schema

from .attention import AttentionSpec
from .base import SpecModel
from .model import ModelSpec
from .sequential import SequentialSpec

MODELS: tuple[type[SpecModel], ...] = (
    AttentionSpec,
    ModelSpec,
    SequentialSpec,
)
"""What the schema describes, each with what it consists of, below `$defs`."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _Written(GenerateJsonSchema):
    """Describes fields as files have them: what is switched off says "none", what is derived is not written."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> dict[str, Any]:
        """An optional field may be "none" beside null: TOML has no null."""
        found = super().nullable_schema(schema)
        return {**found, "anyOf": [*found["anyOf"], {"const": "none"}]}

    def field_is_present(self, field: Any) -> bool:
        """Fields that `to_dict` leaves out are no part of a file."""
        return not field.get("serialization_exclude", False)


def spec_schema() -> dict[str, Any]:
    """The schema: a file with a `pattern` is a ModelSpec, another one an AttentionSpec, as `load_spec` has it."""
    _, found = models_json_schema([(model, "validation") for model in MODELS], schema_generator=_Written)
    return {
        "$schema": DIALECT,
        "title": "A Lyra spec: a whole model, or a single attention layer",
        "if": {"required": ["pattern"]},
        "then": {"$ref": "#/$defs/ModelSpec"},
        "else": {"$ref": "#/$defs/AttentionSpec"},
        "$defs": found["$defs"],
    }


def text(schema: dict[str, Any]) -> str:
    """A schema as its file has it."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
