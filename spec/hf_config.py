"""A Gemma-3 config.json as the fields of a ModelSpec: what transformers reads from it, and what it fills in.

Held to transformers' `Gemma3TextConfig` field by field, without importing it: a JAX user may not have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .attention import AttentionSpec, QKNormSpec, RopeSpec
from .errors import SpecError

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
FIELDS: dict[str, Field] = {
    "vocab_size": Field((int,), 262_208),
    "hidden_size": Field((int,), 2304),
    "intermediate_size": Field((int,), 9216),
    "num_hidden_layers": Field((int,), 26),
    "num_attention_heads": Field((int,), 8),
    "num_key_value_heads": Field((int,), 4),
    "head_dim": Field((int,), 256),
    "hidden_activation": Field((str,), "gelu_pytorch_tanh"),
    "max_position_embeddings": Field((int,), 131_072),
    "initializer_range": Field((float,), 0.02),
    "rms_norm_eps": Field((float,), 1e-6),
    "use_cache": Field((bool,), True),
    "pad_token_id": Field((int, NONE), 0),
    "eos_token_id": Field((int, list, NONE), 1),
    "bos_token_id": Field((int, NONE), 2),
    "tie_word_embeddings": Field((bool,), True),
    "rope_parameters": Field((dict, NONE), None),
    "attention_bias": Field((bool,), False),
    "attention_dropout": Field((int, float, NONE), 0.0),
    "query_pre_attn_scalar": Field((int,), 256),
    "sliding_window": Field((int, NONE), 4096),
    "layer_types": Field((list, NONE), None),
    "final_logit_softcapping": Field((float, NONE), None),
    "attn_logit_softcapping": Field((float, NONE), None),
    "use_bidirectional_attention": Field((bool, NONE), False),
}
"""The fields of a `gemma3_text` config, with transformers' types and defaults."""

OLD_FIELDS: dict[str, Field] = {
    "rope_theta": Field((int, float), 1_000_000.0),
    "rope_local_base_freq": Field((int, float), 10_000.0),
    "rope_scaling": Field((dict, NONE), None),
    "sliding_window_pattern": Field((int,), 6),
}
"""Fields of older files, which transformers turns into `rope_parameters` and `layer_types`."""

LAYER_TYPES = {"sliding_attention": "sliding", "full_attention": "global"}
MOST_LAYERS = 4096
"""More layers than this are a damaged file: a pattern is written out layer by layer."""
LARGEST = 2**31 - 1
"""The largest size that is read; beyond it a file is damaged, and no array has such an axis."""
LARGEST_THETA = 1e30
"""The same of a base or factor of RoPE: float32 holds it, and its pairs hardly turn."""


def text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the text model: those of `text_config` where the config is that of a multimodal model.

    Whether the head is tied, such a model's own config decides where it says so: transformers writes True into every
    text_config. Raises SpecError for another architecture.
    """
    if not isinstance(config, Mapping):
        raise SpecError(f"{OWNER}: expected a table of fields, got {_shown(config)}")
    inner = config.get("text_config")
    if inner is None:
        kind = config.get("model_type")
        if kind != "gemma3_text":
            raise SpecError(f"{OWNER}: model_type is {_shown(kind)}; this reads 'gemma3' and 'gemma3_text'")
        return dict(config)
    if not isinstance(inner, Mapping):
        raise SpecError(f"{OWNER}: text_config is {_shown(inner)}; expected a table of fields")
    kinds = config.get("model_type", "gemma3"), inner.get("model_type", "gemma3_text")
    if kinds != ("gemma3", "gemma3_text"):
        raise SpecError(
            f"{OWNER}: model_type is {_shown(kinds[0])}, that of text_config {_shown(kinds[1])}; this reads "
            f"'gemma3' with a text_config of 'gemma3_text'"
        )
    outer = config.get("tie_word_embeddings")
    tied = {} if outer is None else {"tie_word_embeddings": outer}
    return {**inner, "model_type": "gemma3_text", **tied}


def checked_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every field of FIELDS and OLD_FIELDS, as given or as transformers fills it in. Raises SpecError, naming one.

    `rope_parameters` and `layer_types` are None where the file leaves them out.
    """
    given = text_fields(config)
    values = {}
    for name, field in (FIELDS | OLD_FIELDS).items():
        value = given.get(name, field.default)
        if not field.holds(value):
            raise SpecError(f"{OWNER}: {name} is {_shown(value)}; expected {_expected(field)}")
        if type(value) is int and abs(value) > LARGEST:
            raise SpecError(f"{OWNER}: {name} is {_shown(value)}; expected a number up to {LARGEST:,}")
        values[name] = value
    ends = values["eos_token_id"]
    if isinstance(ends, list) and not all(type(one) is int for one in ends):
        raise SpecError(f"{OWNER}: eos_token_id is {_shown(ends)}; expected an id or a list of ids")
    if values["use_bidirectional_attention"]:
        raise SpecError(f"{OWNER}: use_bidirectional_attention is set; the spec is causal")
    if given.get("per_layer_config"):
        raise SpecError(f"{OWNER}: per_layer_config is set; the spec's layers of one kind have one shape")
    _check_partial_rope(given)
    return values


def spec_fields(config: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """The fields of the ModelSpec that a config describes. Raises SpecError, naming the field that is wrong."""
    values = checked_fields(config)
    for size in ("hidden_size", "num_attention_heads", "num_key_value_heads", "query_pre_attn_scalar"):
        if values[size] < 1:
            raise SpecError(f"{OWNER}: {size} is {values[size]}; expected 1 or more")
    if values["hidden_size"] % values["num_attention_heads"]:
        raise SpecError(
            f"{OWNER}: hidden_size is {values['hidden_size']}; expected a multiple of num_attention_heads "
            f"({values['num_attention_heads']})"
        )
    pattern, ropes = _pattern(values), _ropes(values)
    common: dict[str, Any] = {
        "hidden_size": values["hidden_size"],
        "num_attention_heads": values["num_attention_heads"],
        "num_key_value_heads": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
        "scale": values["query_pre_attn_scalar"] ** -0.5,
        "softcap": values["attn_logit_softcapping"],
        "bias": values["attention_bias"],
        "qk_norm": QKNormSpec(eps=values["rms_norm_eps"]),
    }
    sliding = None
    if "sliding" in pattern:
        if values["sliding_window"] is None:
            raise SpecError(f"{OWNER}: sliding_window is null; the model's sliding-window layers need one")
        sliding = AttentionSpec(**common, rope=ropes["sliding_attention"], sliding_window=values["sliding_window"])
    return {
        "name": name or text_fields(config).get("_name_or_path") or "gemma-3",
        "vocab_size": values["vocab_size"],
        "intermediate_size": values["intermediate_size"],
        "pattern": pattern,
        "attention": AttentionSpec(**common, rope=ropes["full_attention"]),
        "sliding": sliding,
        "rms_norm_eps": values["rms_norm_eps"],
        "hidden_activation": values["hidden_activation"],
        "tie_word_embeddings": values["tie_word_embeddings"],
        "final_softcap": values["final_logit_softcapping"],
    }


def _pattern(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The kind of every layer: as listed, or every n-th one global."""
    kinds, count = values["layer_types"], values["num_hidden_layers"]
    if not 1 <= count <= MOST_LAYERS:
        raise SpecError(f"{OWNER}: num_hidden_layers is {count}; expected 1 to {MOST_LAYERS:,}")
    if kinds is None:
        every = values["sliding_window_pattern"]
        if every == 0:
            raise SpecError(f"{OWNER}: sliding_window_pattern is 0; expected n, where every n-th layer is global")
        return tuple("sliding" if (index + 1) % every else "global" for index in range(count))
    unknown = [kind for kind in kinds if not isinstance(kind, str) or kind not in LAYER_TYPES]
    if unknown:
        raise SpecError(f"{OWNER}: unknown layer_types {_shown(unknown)}; known: {list(LAYER_TYPES)}")
    if len(kinds) != count:
        raise SpecError(f"{OWNER}: layer_types has {len(kinds)} entries; expected num_hidden_layers, {count}")
    return tuple(LAYER_TYPES[kind] for kind in kinds)


def _ropes(values: Mapping[str, Any]) -> dict[str, RopeSpec]:
    """RoPE of both kinds of layer, by transformers' rules.

    New files keep it in `rope_parameters`, by kind of layer; a flat table there says nothing of either kind. What is
    left out comes from the old fields, and what these leave out from their defaults. `rope_scaling` goes over the
    global layers' table.
    """
    given, scaling = values["rope_parameters"], values["rope_scaling"]
    tables = {kind: {"rope_type": "default"} if given is None else given.get(kind) for kind in LAYER_TYPES}
    for kind, table in tables.items():
        if table is not None and not isinstance(table, Mapping):
            raise SpecError(f"{OWNER}: rope_parameters.{kind} is {_shown(table)}; expected a table")
    full = tables["full_attention"]
    if scaling is not None and full is None:
        raise SpecError(f"{OWNER}: rope_scaling is set beside rope_parameters without full_attention; give one of them")
    thetas = {"full_attention": values["rope_theta"], "sliding_attention": values["rope_local_base_freq"]}
    tables["full_attention"] = {**(full or {}), **(scaling or {})}
    return {kind: _rope(kind, {"rope_theta": thetas[kind], **(table or {})}) for kind, table in tables.items()}


def _rope(kind: str, fields: Mapping[str, Any]) -> RopeSpec:
    name = fields.get("rope_type", fields.get("type", "default"))
    where = f"{OWNER}: rope_parameters.{kind}"
    if name not in ("default", "linear"):
        raise SpecError(f"{where}: rope_type is {_shown(name)}; the spec has 'default' and 'linear'")
    if name == "linear" and "factor" not in fields:
        raise SpecError(f"{where}: rope_type is 'linear' and there is no factor; give it")
    numbers = {"theta": fields["rope_theta"], "factor": fields["factor"] if name == "linear" else 1.0}
    for field, value in numbers.items():
        if type(value) not in (int, float) or not 0 < value <= LARGEST_THETA:
            raise SpecError(f"{where}: {field} is {_shown(value)}; expected a number above 0")
    return RopeSpec(**{field: float(value) for field, value in numbers.items()})


def _check_partial_rope(given: Mapping[str, Any]) -> None:
    ropes = given.get("rope_parameters") or {}
    for table in (given, given.get("rope_scaling"), *(ropes.get(kind) for kind in LAYER_TYPES)):
        part = table.get("partial_rotary_factor") if isinstance(table, Mapping) else None
        if part is not None and part != 1:
            raise SpecError(f"{OWNER}: partial_rotary_factor is {_shown(part)}; the spec turns whole heads")


def _expected(field: Field) -> str:
    names = {int: "an integer", float: "a number with a decimal point", bool: "true or false", str: "a string",
             dict: "a table", list: "a list", NONE: "null"}  # fmt: skip
    return " or ".join(names[kind] for kind in field.kinds)


def _shown(value: Any) -> str:
    """The value as a message shows it: a file may hold a very long one."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return f"a very long {type(value).__name__}"
    return text if len(text) <= 100 else text[:97] + "..."
