"""ModelSpec.from_hf_config against transformers' own Gemma3TextConfig: every field, over generated configs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lyra.spec import ModelSpec, RopeSpec, SpecError
from lyra.spec.families.config import LAYER_TYPES
from lyra.spec.families.gemma3 import FIELDS
from lyra.spec.hf_config import checked_fields

transformers = pytest.importorskip("transformers")

SIZES: dict[str, list[Any]] = {
    "vocab_size": [97, 262_144, 0, 3.0, None],
    "hidden_size": [32, 60, 66, -4, "32"],
    "intermediate_size": [48, 0, True],
    "num_hidden_layers": [1, 2, 4, 7, 0, -1],
    "num_attention_heads": [1, 2, 4, 0, 3, None],
    "num_key_value_heads": [1, 2, 4, 0],
    "head_dim": [2, 8, 16, 7, None],
    "hidden_activation": ["gelu_pytorch_tanh", "relu", None],
    "max_position_embeddings": [16, 4096, "many"],
    "initializer_range": [0.1, 1],
    "rms_norm_eps": [1e-6, 1e-5, 1, None],
    "use_cache": [True, False, None],
    "pad_token_id": [0, 3, None, "0"],
    "eos_token_id": [1, [1, 5], None, ["a"]],
    "bos_token_id": [2, None, 2.0],
    "tie_word_embeddings": [True, False, None, 1],
    "attention_bias": [True, False, None],
    "attention_dropout": [0, 0.0, None, "0"],
    "query_pre_attn_scalar": [24, 168, 16.5, None],
    "sliding_window": [8, 512, None, 0],
    "final_logit_softcapping": [None, 30.0, 30],
    "attn_logit_softcapping": [None, 50.0, True],
    "use_bidirectional_attention": [None, False, True],
    "sliding_window_pattern": [1, 2, 6, 0, None, "2"],
    "_sliding_window_pattern": [3],
    "rope_theta": [5e5, 1000, None],
    "rope_local_base_freq": [2e4, 5000, None],
}
TABLE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(["default", "linear", "yarn", None]),
        "type": st.sampled_from(["default", "linear"]),
        "factor": st.sampled_from([8.0, 2, 0, "8", None]),
        "rope_theta": st.sampled_from([3e4, 7, 0.0, None, "x"]),
    },
)
TABLES = st.one_of(st.none(), TABLE, st.sampled_from([[1], "linear"]))
ROPES: dict[str, st.SearchStrategy[Any]] = {
    "rope_parameters": st.one_of(
        st.none(),
        TABLE,
        st.fixed_dictionaries({}, optional=dict.fromkeys(LAYER_TYPES, TABLES)),
        st.sampled_from([[1], "linear"]),
    ),
    "rope_scaling": st.one_of(st.none(), TABLE),
    "layer_types": st.one_of(
        st.none(), st.lists(st.sampled_from([*LAYER_TYPES, *LAYER_TYPES, "chunked_attention"]), max_size=4)
    ),
}
FIELD_VALUES = {name: st.sampled_from(values) for name, values in SIZES.items()} | ROPES


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A small model that is one, and up to four fields that are changed or left out."""
    config: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    for name in draw(st.lists(st.sampled_from(sorted(FIELD_VALUES)), max_size=4, unique=True)):
        config[name] = draw(FIELD_VALUES[name])
    for name in draw(st.lists(st.sampled_from(sorted(FIELD_VALUES)), max_size=2)):
        config.pop(name, None)
    return config


def theirs(config: dict[str, Any]) -> Any:
    """transformers' reading of it; None where it refuses, with whatever it raises."""
    try:
        return transformers.Gemma3TextConfig(**json.loads(json.dumps(config)))
    except Exception:  # StrictDataclass…, TypeError, ZeroDivisionError, KeyError, AttributeError
        return None


def ours(config: dict[str, Any]) -> ModelSpec | str:
    """The spec's reading of it, or what it says where it refuses."""
    try:
        return ModelSpec.from_hf_config({"model_type": "gemma3_text", **config})
    except SpecError as refusal:
        return str(refusal)


def beyond_the_spec(config: Any) -> bool:
    """Whether transformers' config holds what no model is computed with, or what the spec does not have."""
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "query_pre_attn_scalar")  # fmt: skip
    if any(getattr(config, name) < 1 for name in sizes) or config.use_bidirectional_attention:
        return True
    if config.head_dim % 2 or config.num_attention_heads % config.num_key_value_heads:
        return True
    if "sliding_attention" in config.layer_types and not config.sliding_window:
        return True
    if set(config.layer_types) - set(LAYER_TYPES):
        return True
    ropes = [config.rope_parameters[kind] for kind in LAYER_TYPES]
    return not all(has_rope(table) for table in ropes)


def has_rope(table: Any) -> bool:
    kind = table.get("rope_type", table.get("type", "default"))
    numbers = [table["rope_theta"], *([table.get("factor")] if kind == "linear" else [])]
    return kind in ("default", "linear") and all(isinstance(number, int | float) and number > 0 for number in numbers)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(configs())
@example({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}}})
@example({"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}, "rope_theta": 3e5})
@example({"rope_parameters": {"full_attention": None}, "rope_theta": 5, "rope_local_base_freq": 7})
@example({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}, "rope_scaling": {"factor": 2}})
@example({"rope_scaling": {"type": "linear", "factor": 4.0}})
@example({"_sliding_window_pattern": 3, "num_hidden_layers": 7})
def test_a_config_means_what_it_means_to_transformers(config: dict[str, Any]) -> None:
    """The same in every field, or one SpecError: where transformers refuses, and where the spec has no such thing."""
    before = json.dumps(config)
    found = theirs(config)
    spec = ours(config)
    if isinstance(spec, str):
        assert spec.count("\n") == 0
        assert found is None or beyond_the_spec(found), spec
        return
    assert json.dumps(config) == before
    assert found is not None
    fields = checked_fields({"model_type": "gemma3_text", **config})
    for name in set(FIELDS) - {"rope_parameters", "layer_types"}:
        assert fields[name] == getattr(found, name), name
    assert spec.pattern == tuple(LAYER_TYPES[kind] for kind in found.layer_types)
    assert (spec.vocab_size, spec.intermediate_size) == (found.vocab_size, found.intermediate_size)
    assert spec.rms_norm_eps == found.rms_norm_eps
    assert spec.hidden_activation == found.hidden_activation
    assert spec.tie_word_embeddings == found.tie_word_embeddings
    assert spec.final_softcap == found.final_logit_softcapping
    layers = [(spec.attention, "full_attention", None)]
    if spec.sliding is not None:
        layers.append((spec.sliding, "sliding_attention", found.sliding_window))
    for layer, kind, window in layers:
        assert layer.hidden_size == found.hidden_size
        assert layer.num_attention_heads == found.num_attention_heads
        assert layer.num_key_value_heads == found.num_key_value_heads
        assert layer.head_dim == found.head_dim
        assert layer.scale == found.query_pre_attn_scalar**-0.5
        assert layer.softcap == found.attn_logit_softcapping
        assert layer.bias == found.attention_bias
        assert layer.qk_norm is not None
        assert layer.qk_norm.eps == found.rms_norm_eps
        assert layer.sliding_window == window
        assert layer.rope == rope_of(found, kind)


def rope_of(config: Any, kind: str) -> RopeSpec:
    """The spec whose frequencies transformers' rotary embedding would compute."""
    table = config.rope_parameters[kind]
    linear = table.get("rope_type", table.get("type", "default")) == "linear"
    return RopeSpec(theta=table["rope_theta"], factor=table["factor"] if linear else 1.0)


def test_every_field_of_transformers_config_is_known() -> None:
    """With transformers' types and defaults: a field that it gains is noticed here."""
    own = set(transformers.Gemma3TextConfig.__annotations__)
    assert own == set(FIELDS)
    defaults = transformers.Gemma3TextConfig()
    for name in set(FIELDS) - {"rope_parameters", "layer_types"}:
        assert FIELDS[name].default == getattr(defaults, name), name


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [(None, None, True), (False, None, False), (None, False, False), (True, True, True), (False, True, False)],
)
def test_a_multimodal_config_says_whether_the_head_is_tied(outer: bool | None, inner: bool | None, tied: bool) -> None:
    """The outer one where it does: transformers writes True into every text_config."""
    config = {"model_type": "gemma3", "text_config": {} if inner is None else {"tie_word_embeddings": inner}}
    config |= {} if outer is None else {"tie_word_embeddings": outer}
    assert ModelSpec.from_hf_config(config).tie_word_embeddings is tied


def test_defaults_are_the_same_without_transformers() -> None:
    config = {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"type": "linear", "factor": 8.0}}}
    code = (
        "import json, sys\n"
        "sys.modules['transformers'] = sys.modules['torch'] = None\n"
        "from lyra.spec import ModelSpec\n"
        f"print(ModelSpec.from_hf_config(json.loads({json.dumps(config)!r})).to_json())\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ModelSpec.from_json(done.stdout) == ModelSpec.from_hf_config(config)
    assert ModelSpec.from_hf_config(config).attention.rope == RopeSpec(theta=1e6, factor=8.0)
