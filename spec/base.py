"""The base of every spec class: frozen, hashable, strict about names, one readable error, TOML and JSON round trip."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import SpecError
from .files import write_atomically
from .text_file import parse_json, parse_toml, read_toml


class SpecModel(BaseModel):
    """A frozen pydantic model whose fields may be given by position, and whose refusals are `SpecError`s."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, *args: Any, **fields: Any) -> None:
        names = list(type(self).model_fields)
        if len(args) > len(names):
            raise SpecError(f"{type(self).__name__}: takes at most {len(names)} values, got {len(args)}")
        for name, value in zip(names, args, strict=False):
            if name in fields:
                raise SpecError(f"{type(self).__name__}.{name}: given twice, by position and by name")
            fields[name] = value
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise SpecError.from_validation(type(self).__name__, error) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again (pydantic's own `model_copy` does not validate)."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**(fields | changes))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what JSON and TOML hold. Fields that are None are written where None is not the default."""
        return {
            name: _plain(value)
            for name, field in type(self).model_fields.items()
            if not field.exclude and (value := getattr(self, name)) != field.get_default(call_default_factory=True)
        }

    def to_json(self) -> str:
        """The spec as JSON text; `from_json` gives an equal spec."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The spec a JSON text describes. Raises SpecError."""
        return cls.from_dict(parse_json(text, f"{cls.__name__}: the text", what="its fields"))

    def to_toml(self, path: str | os.PathLike[str] | None = None) -> str:
        """The spec as TOML text, also written to `path` (through a temporary name) if one is given."""
        import tomli_w  # here, so that the spec alone needs NumPy and pydantic only

        text = tomli_w.dumps(self.to_dict())
        if path is not None:
            write_atomically(Path(path), text.encode())
        return text

    @classmethod
    def from_toml(cls, source: str | os.PathLike[str]) -> Self:
        """The spec of a TOML file (a path ending in .toml) or a TOML text. Raises SpecError, FileNotFoundError."""
        is_file = isinstance(source, os.PathLike) or ("\n" not in source and source.endswith(".toml"))
        what = f"the fields of {cls.__name__}"
        return cls.from_dict(read_toml(source, what=what) if is_file else parse_toml(str(source), what=what))

    @classmethod
    def from_dict(cls, fields: Any) -> Self:
        """The spec that plain data describes. Raises SpecError."""
        if not isinstance(fields, dict):
            raise SpecError(f"{cls.__name__}: expected a table of fields, got {fields!r}")
        return cls(**fields)


def _plain(value: Any) -> Any:
    if value is None:
        return "none"  # TOML has no null: a field that is switched off says so
    if isinstance(value, SpecModel):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
