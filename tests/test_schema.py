"""The published JSON Schemas: in step with the code, and saying of files what the code says of them."""

from __future__ import annotations

import json
import re
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from small_layers import layer, layers
from typer.testing import CliRunner

from lyra.cli import application
from lyra.conformance.report.data import Report, report_data, report_schema
from lyra.conformance.session import Session
from lyra.spec import AttentionSpec, HeadSplit, LayerSplit, ModelSpec, SequentialSpec, SpecError, load_spec, presets
from lyra.spec.base import SpecModel
from lyra.spec.families import FAMILIES
from lyra.spec.schema import MODELS, spec_schema, text

SPEC = Draft202012Validator(spec_schema())
QUICK = settings(max_examples=60, deadline=None, database=None)
positive = st.floats(1e-30, 1e30, allow_nan=False, allow_infinity=False)


def of(model: type[SpecModel]) -> Draft202012Validator:
    """The schema of one of the models."""
    return Draft202012Validator({"$ref": f"#/$defs/{model.__name__}", "$defs": spec_schema()["$defs"]})


@st.composite
def models(draw: st.DrawFn) -> ModelSpec:
    attention = draw(layers(window=False))
    pattern = draw(st.lists(st.sampled_from(["sliding", "global"]), min_size=1, max_size=5))
    globals_ = [index for index, kind in enumerate(pattern) if kind == "global"]
    split = st.builds(
        lambda heads: HeadSplit.from_q_heads(attention, heads, share_kv=None),
        st.sets(st.integers(0, attention.num_attention_heads - 1)),
    )
    split_layers = draw(st.sets(st.sampled_from(globals_))) if globals_ else set()
    fields: dict[str, Any] = {
        "name": draw(st.text(st.characters(codec="utf-8"), max_size=8)),
        "vocab_size": draw(st.integers(1, 10**6)),
        "intermediate_size": draw(st.integers(1, 10**6)),
        "pattern": tuple(pattern),
        "attention": attention,
        "sliding": attention.replace(split=None, sliding_window=draw(st.integers(1, 4096))),
        "rms_norm_eps": draw(positive),
        "hidden_activation": draw(st.sampled_from(["gelu_pytorch_tanh", "silu"])),
        "tie_word_embeddings": draw(st.booleans()),
        "final_softcap": draw(st.none() | positive),
        "splits": tuple(LayerSplit(layer=index, split=draw(split)) for index in sorted(split_layers)),
        "family": draw(st.sampled_from([None, *FAMILIES])),
    }
    assert set(fields) == set(ModelSpec.model_fields)
    return ModelSpec(**fields)


@st.composite
def blocks(draw: st.DrawFn) -> SequentialSpec:
    attention = draw(layers(window=False))
    source = draw(st.sampled_from(["external", "own"]))
    fields: dict[str, Any] = {
        "attention": attention.replace(split=None) if source == "own" else attention,
        "residual": draw(st.booleans()),
        "gate": draw(st.floats(-1e6, 1e6)),
        "norm_eps": draw(positive),
        "output_norm": draw(st.booleans()),
        "source": source,
    }
    assert set(fields) == set(SequentialSpec.model_fields)
    return SequentialSpec(**fields)


@QUICK
@given(spec=st.one_of(layers(), models(), blocks()))
def test_every_spec_survives_its_texts_and_keeps_the_schema(spec: SpecModel) -> None:
    assert type(spec) in MODELS
    kind = type(spec)
    assert kind.from_toml(spec.to_toml()) == kind.from_json(spec.to_json()) == spec
    of(kind).validate(tomllib.loads(spec.to_toml()))
    of(kind).validate(json.loads(spec.to_json()))


@pytest.mark.parametrize("name", presets())
def test_presets_keep_the_schema(name: str) -> None:
    written = tomllib.loads((files("lyra.spec") / "presets" / f"{name}.toml").read_text())
    SPEC.validate(written)
    SPEC.validate(load_spec(name).to_dict())


def test_every_field_that_may_be_off_may_say_none() -> None:
    fields = {"softcap", "sliding_window", "qk_norm", "rope", "split"}
    optional = {
        name
        for name, field in spec_schema()["$defs"]["AttentionSpec"]["properties"].items()
        if {"const": "none"} in field.get("anyOf", [])
    }
    assert optional == fields
    for off in ("none", None):
        data = layer().to_dict() | dict.fromkeys(fields, off)
        SPEC.validate(data)
        assert AttentionSpec.from_dict(data) == layer(qk_norm=None, rope=None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": 0},
        {"hidden_size": "wide"},
        {"scale": "none"},
        {"surprise": 1},
        {"static": {"live": "all"}},
        {"split": {"lyra_q_heads": [0], "num_attention_heads": 8}},
        {"pattern": ["global"]},
    ],
)
def test_the_schema_refuses_what_the_code_refuses(wrong: dict[str, Any]) -> None:
    data = layer().to_dict() | wrong
    assert list(SPEC.iter_errors(data))
    if "split" not in wrong:  # the head counts of a split are derived: a file has no business with them
        with pytest.raises(SpecError):
            ModelSpec.from_dict(data) if "pattern" in wrong else AttentionSpec.from_dict(data)


def test_reports_keep_their_schema() -> None:
    validator = Draft202012Validator(report_schema())
    validator.validate(json.loads(report_data(Session(), 1.0).model_dump_json()))
    assert list(validator.iter_errors({"ok": True}))
    assert set(report_schema()["properties"]) == set(Report.model_fields)


@pytest.mark.parametrize(("name", "made"), [("spec", spec_schema), ("report", report_schema)])
def test_the_published_schemas_are_those_of_the_code(name: str, made: Any) -> None:
    Draft202012Validator.check_schema(made())
    shown = CliRunner().invoke(application(), ["schema", name])
    assert shown.exit_code == 0
    folder = Path(__file__).parents[1] / ("spec" if name == "spec" else "conformance/report")
    written = (folder / "schema.json").read_text(encoding="utf-8")
    assert shown.stdout == written == text(made()), "the models have changed: run make schema"


def test_the_file_that_the_guide_shows_keeps_the_schema() -> None:
    page = (Path(__file__).parents[1] / "docs" / "spec.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    SPEC.validate(tomllib.loads(shown))
    assert AttentionSpec.from_toml(shown).lyra_q_heads == (2, 3)
