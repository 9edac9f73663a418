"""Reading a config.json field by field, as transformers reads it, without importing it: a JAX user may not have it.

What a family's fields are called and what they mean stands in its own module; here is what families share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..attention import RopeSpec
from ..errors import SpecError

OWNER = "ModelSpec.from_hf_config"


class Field(NamedTuple):
    """What a config's field may hold, and what it means that it is not there."""

    kinds: tuple[type, ...]
    default: Any

    def holds(self, value: Any) -> bool:
        """Whether transformers takes the value: a bool is no int, an int no float, and null only where it says so."""
        if value is None:
            return type(None) in self.kinds
        return type(value) in self.kinds


NONE = type(None)
LAYER_TYPES = {"sliding_attention": "sliding", "full_attention": "global"}
"""What a config calls the kinds of layers, and what the spec does."""
MOST_LAYERS = 4096
"""More layers than this are a damaged file: a pattern is written out layer by layer."""
LARGEST = 2**31 - 1
"""The largest size that is read; beyond it a file is damaged, and no array has such an axis."""
LARGEST_THETA = 1e30
"""The same of a base or factor of RoPE: float32 holds it, and its pairs hardly turn."""


def refusal(text: str) -> SpecError:
    """The error of a config that is refused."""
    return SpecError(f"{OWNER}: {text}")


def read_fields(given: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """Every one of `fields`, as given or as it is filled in. Raises SpecError, naming one that holds another kind."""
    values = {}
    for name, field in fields.items():
        value = given.get(name, field.default)
        if not field.holds(value):
            raise refusal(f"{name} is {shown(value)}; expected {_expected(field)}")
        if type(value) is int and abs(value) > LARGEST:
            raise refusal(f"{name} is {shown(value)}; expected a number up to {LARGEST:,}")
        values[name] = value
    ends = values.get("eos_token_id")
    if isinstance(ends, list) and not all(type(end) is int for end in ends):
        raise refusal(f"eos_token_id is {shown(ends)}; expected an id or a list of ids")
    return values


def check_sizes(values: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Sizes of 1 or more, and a width that the heads divide, as transformers asks. Raises SpecError."""
    for size in names:
        if values[size] < 1:
            raise refusal(f"{size} is {values[size]}; expected 1 or more")
    if values["hidden_size"] % values["num_attention_heads"]:
        raise refusal(
            f"hidden_size is {values['hidden_size']}; expected a multiple of num_attention_heads "
            f"({values['num_attention_heads']})"
        )


def layer_pattern(kinds: list[Any] | None, count: int, every: int | None) -> tuple[str, ...]:
    """The kind of each of `count` layers: as listed in `kinds`, or every n-th one global, or all (None). Raises
    SpecError."""
    if not 1 <= count <= MOST_LAYERS:
        raise refusal(f"num_hidden_layers is {count}; expected 1 to {MOST_LAYERS:,}")
    if kinds is None:
        if every == 0:
            raise refusal("sliding_window_pattern is 0; expected n, where every n-th layer is global")
        return tuple("sliding" if every is not None and (index + 1) % every else "global" for index in range(count))
    unknown = [kind for kind in kinds if not isinstance(kind, str) or kind not in LAYER_TYPES]
    if unknown:
        raise refusal(f"unknown layer_types {shown(unknown)}; known: {list(LAYER_TYPES)}")
    if len(kinds) != count:
        raise refusal(f"layer_types has {len(kinds)} entries; expected num_hidden_layers, {count}")
    return tuple(LAYER_TYPES[kind] for kind in kinds)


def read_rope(where: str, table: Mapping[str, Any]) -> RopeSpec:
    """RoPE as a table of rope_type, rope_theta and factor says; `where` names it in refusals. Raises SpecError."""
    name = table.get("rope_type", table.get("type", "default"))
    if name not in ("default", "linear"):
        raise refusal(f"{where}: rope_type is {shown(name)}; the spec has 'default' and 'linear'")
    if name == "linear" and "factor" not in table:
        raise refusal(f"{where}: rope_type is 'linear' and there is no factor; give it")
    numbers = {"theta": table["rope_theta"], "factor": table["factor"] if name == "linear" else 1.0}
    for field, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value <= LARGEST_THETA:
            raise refusal(f"{where}: {field} is {shown(value)}; expected a number above 0")
    return RopeSpec(**{field: float(value) for field, value in numbers.items()})


def check_whole_heads_turn(*tables: Any) -> None:
    """Refuse a RoPE that turns a part of each head, in any of these tables. Raises SpecError."""
    for table in tables:
        part = table.get("partial_rotary_factor") if isinstance(table, Mapping) else None
        if part is not None and part != 1:
            raise refusal(f"partial_rotary_factor is {shown(part)}; the spec turns whole heads")


def shown(value: Any) -> str:
    """The value as a message shows it: a file may hold a very long one."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a very long {type(value).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."


def _expected(field: Field) -> str:
    names = {int: "an integer", float: "a number with a decimal point", bool: "true or false", str: "a string",
             dict: "a table", list: "a list", NONE: "null"}  # fmt: skip
    return " or ".join(names[kind] for kind in field.kinds)
