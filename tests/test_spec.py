"""AttentionSpec and the clauses: accepted, refused, derived, written and read; no framework is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from pydantic import BaseModel
from small_layers import layer, layers

from lyra.spec import (
    AttentionSpec,
    HeadSplit,
    ModelSpec,
    QKNormSpec,
    RopeSpec,
    SpecError,
    StaticSpec,
    load_spec,
)
from lyra.spec.attention import STAGES, TRACES
from lyra.spec.clauses import clauses, parse, statements
from lyra.spec.files import renamed_into, write_atomically

QUICK = settings(max_examples=150, deadline=None, database=None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"num_key_value_heads": 3},
            "num_attention_heads=8 is not a multiple of num_key_value_heads=3; use one of [1, 2",
        ),
        ({"num_key_value_heads": 16}, "is not a multiple"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": -4}, "hidden_size"),
        ({"head_dim": 5}, "head_dim=5 is odd"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"softcap": -1.0}, "softcap"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"static": {"live": "all"}}, "StaticSpec.live"),
        ({"rope": {"theta": 0}}, "RopeSpec.theta"),
        ({"qk_norm": {"epsilon": 1e-6}}, "QKNormSpec.epsilon"),
        ({"heads": 8}, "heads"),
        ({"order": STAGES[::-1]}, "is not a legal order; this version has one"),
        ({"split": HeadSplit((1,))}, "share_kv=True"),
        ({"split": HeadSplit((9,))}, "there are no query heads [9]"),
        ({"split": HeadSplit((0, 1)), "sliding_window": 4}, "carries no Lyra heads"),
    ],
)
def test_what_is_no_layer_is_refused_naming_the_field(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        layer().replace(**changes)
    assert words in str(caught.value)
    assert "https://" not in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        AttentionSpec(hidden_size=0, num_attention_heads="many", head_dim=4, scale=1.0)
    text = str(caught.value)
    assert len(text.splitlines()) == 3
    assert all(name in text for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "'many'"))


def test_an_odd_head_needs_no_rope() -> None:
    assert layer(head_dim=5, rope=None).rope is None


def test_a_split_in_a_spec_knows_its_heads() -> None:
    spec = layer(split=HeadSplit((2, 3, 6, 7)))
    assert spec.split is not None
    assert spec.lyra_kv_heads == spec.split.lyra_kv_heads == (1, 3)
    assert spec.split.vanilla_q_heads == (0, 1, 4, 5)
    assert layer().lyra_q_heads == layer().lyra_kv_heads == ()
    assert layer(split=HeadSplit.none(), sliding_window=3).lyra_q_heads == ()


@QUICK
@given(spec=layers())
def test_a_layer_survives_toml_json_and_dict(spec: AttentionSpec) -> None:
    for again in (
        AttentionSpec.from_toml(spec.to_toml()),
        AttentionSpec.from_json(spec.to_json()),
        AttentionSpec.from_dict(spec.to_dict()),
        spec.replace(),
        eval(repr(spec), {"AttentionSpec": AttentionSpec, **_names()}),
    ):
        assert again == spec
        assert hash(again) == hash(spec)
        assert again.lyra_kv_heads == spec.lyra_kv_heads


def _names() -> dict[str, type[BaseModel]]:
    return {one.__name__: one for one in (HeadSplit, QKNormSpec, RopeSpec, StaticSpec)}


@QUICK
@given(one=layers(), other=layers())
def test_layers_are_keys(one: AttentionSpec, other: AttentionSpec) -> None:
    assume(one != other)
    found = {one: 1, other: 2}
    assert (found[one.replace()], found[other.replace()]) == (1, 2)


def test_a_layer_cannot_be_changed() -> None:
    spec = layer()
    with pytest.raises(ValueError, match="frozen"):
        spec.scale = 1.0  # type: ignore[misc]
    with pytest.raises(SpecError, match="scale"):
        spec.replace(scale=-1.0)


def test_toml_files(tmp_path: Path) -> None:
    spec = layer(qk_norm=None, split=HeadSplit((0, 1)))
    path = tmp_path / "layer.toml"
    assert spec.to_toml(path) == path.read_text()
    assert 'qk_norm = "none"' in path.read_text()
    assert AttentionSpec.from_toml(path) == AttentionSpec.from_toml(str(path)) == load_spec(path) == spec
    assert [one.name for one in tmp_path.iterdir()] == ["layer.toml"]
    with pytest.raises(SpecError, match="is not TOML"):
        AttentionSpec.from_toml("hidden_size = \n")
    with pytest.raises(SpecError, match="not JSON"):
        AttentionSpec.from_json("{")
    with pytest.raises(SpecError, match="holds a list; expected JSON"):
        AttentionSpec.from_json("[1]")
    with pytest.raises(FileNotFoundError):
        AttentionSpec.from_toml(str(tmp_path / "none.toml"))
    with pytest.raises(SpecError, match=r"neither a \.toml file nor a preset; presets: gemma-3-12b"):
        load_spec("gemma-4")


def test_the_shapes_of_weights() -> None:
    shapes = layer(bias=True).weight_shapes()
    assert shapes == {
        "q_proj.weight": (48, 24),
        "k_proj.weight": (24, 24),
        "v_proj.weight": (24, 24),
        "o_proj.weight": (24, 48),
        "q_proj.bias": (48,),
        "k_proj.bias": (24,),
        "v_proj.bias": (24,),
        "o_proj.bias": (24,),
        "q_norm.weight": (6,),
        "k_norm.weight": (6,),
    }
    assert set(layer(qk_norm=None).weight_shapes()) == {f"{one}_proj.weight" for one in "qkvo"}


def test_a_stage_that_is_off_leaves_no_trace() -> None:
    everything = tuple(name for stage in STAGES for name in TRACES[stage])
    assert layer().trace_names() == everything
    assert layer(rope=None).trace_names() == tuple(name for name in everything if not name.endswith("rope"))
    assert layer(qk_norm=None).trace_names() == tuple(name for name in everything if not name.endswith("norm"))


@pytest.mark.parametrize("model", [AttentionSpec, HeadSplit, ModelSpec])
def test_there_is_a_json_schema(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(model.model_fields)
    assert json.loads(json.dumps(schema)) == schema


def test_the_schema_names_the_modes() -> None:
    schema = AttentionSpec.model_json_schema()["$defs"]["StaticSpec"]["properties"]
    assert schema["live"]["enum"] == ["causal", "self", "none"]
    assert schema["positions"]["enum"] == ["continue", "overlay"]


# Clauses


def test_every_clause_has_statements_and_an_example() -> None:
    page = (Path(sys.modules[ModelSpec.__module__].__file__ or "").parent / "SPEC.md").read_text()
    sections = page.split("\n## ")[1:]
    assert [section.split(":")[0] for section in sections] == list(clauses())
    for clause, text in zip(clauses().values(), sections, strict=True):
        assert clause.statements
        assert [one.id for one in clause.statements] == [
            f"{clause.name}-{i + 1}" for i in range(len(clause.statements))
        ]
        assert all(
            statement.clause == clause.name and statement.text.rstrip().endswith((".", ":"))
            for statement in clause.statements
        )
        assert "Example" in text or clause.name == "TOLERANCE"
    assert len(statements()) == sum(len(one.statements) for one in clauses().values()) == page.count("\n- **")


def test_a_page_that_contradicts_itself_is_refused() -> None:
    page = "## ONE: first\n\n- **ONE-1** (MUST) be\n  true.\n- **ONE-2** (SHOULD) be.\n"
    assert parse(page)["ONE"].statements[0] == ("ONE-1", "MUST", "be true.")
    for wrong in ("- **ONE-1** (MUST) again.\n", "- **TWO-1** (MUST) elsewhere.\n"):
        with pytest.raises(SpecError, match="stands twice or under the heading 'ONE'"):
            parse(page + wrong)


# What it needs

BLOCKED = (
    "torch",
    "jax",
    "flax",
    "transformers",
    "safetensors",
    "tomli_w",
    "rich",
    "typer",
    "tokenizers",
    "hypothesis",
    "xxhash",
)
NEEDS_NUMPY_AND_PYDANTIC = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
import numpy as np
import lyra.spec
from lyra.spec.clauses import statements
from lyra.spec.reference import reference
model = lyra.spec.ModelSpec.preset("gemma-3-12b-lyra-8q4kv")
spec = lyra.spec.AttentionSpec(8, 4, 2, 4, 0.5, split=lyra.spec.HeadSplit((2, 3)))
assert lyra.spec.AttentionSpec.from_json(spec.to_json()) == spec
weights = {{name: np.ones(shape, np.float32) for name, shape in spec.weight_shapes().items()}}
x = np.ones((1, 2, 8), np.float32)
assert reference(spec, weights, x, positions=np.array([[0, 1]]))["output"].value.shape == x.shape
print(len(statements()), model.attention.lyra_kv_heads)
"""


def test_the_spec_and_the_oracle_need_numpy_and_pydantic_only(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", NEEDS_NUMPY_AND_PYDANTIC], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(statements())} (4, 5, 6, 7)\n"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, b"through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    assert pipe.is_fifo()
    with pytest.raises(FileExistsError, match="is no file; give another name"), renamed_into(pipe):
        pass
    assert list(tmp_path.iterdir()) == [pipe]
