"""Parameters of MHA, GQA and MQA: `lyra gqa params` and what it counts with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lyra.cli import application
from lyra.spec.attention import grouped
from lyra.spec.errors import SpecError
from lyra.spec.model import ModelSpec, presets
from lyra.studies.parameters import groupings, kind, projections, reduction

REFERENCE = {8: 0.0, 4: 1 / 3, 2: 0.5, 1: 7 / 12}
"""KV heads and the share of q+k+v that they save: 8 query heads, width 128."""


@pytest.mark.parametrize(("kv_heads", "saved"), REFERENCE.items())
def test_parameter_reduction(kv_heads: int, saved: float) -> None:
    assert reduction(grouped(128, 8, kv_heads)) == pytest.approx(saved)


def test_a_query_projection_of_width_128_has_16384_parameters() -> None:
    counts = projections(grouped(128, 8, 2))
    assert (counts.q, counts.k, counts.v, counts.o) == (16_384, 4_096, 4_096, 16_384)
    assert counts.qkv == 24_576


def test_mha_is_the_default() -> None:
    assert grouped(128, 8).num_key_value_heads == 8
    assert grouped(128, 8).head_dim == 16
    assert grouped(128, 8, head_dim=32).head_dim == 32


def test_invalid_grouping() -> None:
    with pytest.raises(SpecError, match=r"num_attention_heads=8 is not a multiple of num_key_value_heads=3"):
        grouped(128, 8, 3)
    with pytest.raises(SpecError, match=r"hidden_size=130 is not a multiple of num_heads=8; give head_dim"):
        grouped(130, 8)


@pytest.mark.parametrize(
    ("hidden_size", "heads", "kv_heads"), [(128, 0, None), (0, 8, None), (128, 8, 0), (128, 8, -1)]
)
def test_invalid_kv_head_count(hidden_size: int, heads: int, kv_heads: int | None) -> None:
    with pytest.raises(SpecError):
        grouped(hidden_size, heads, kv_heads)


def test_grouping() -> None:
    assert groupings(12) == (12, 6, 4, 3, 2, 1)
    assert [kind(12, n) for n in groupings(12)] == ["MHA", "GQA-6", "GQA-4", "GQA-3", "GQA-2", "MQA"]


@pytest.mark.parametrize("name", presets())
def test_parameter_count_consistency(name: str) -> None:
    """The four projections are all the weights a layer has, but for the norms of queries and keys."""
    spec = ModelSpec.preset(name).attention
    counts = projections(spec)
    shapes = {key: shape for key, shape in spec.weight_shapes().items() if "norm" not in key}
    assert counts.qkv + counts.o == sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in shapes.values())
    assert 0 <= reduction(spec) < 2 / 3


@pytest.mark.parametrize(
    ("name", "heads"),
    {
        "gpt2": (12, 12),
        "gpt3": (96, 96),
        "llama-7b": (32, 32),
        "llama-2-7b": (32, 32),
        "llama-2-70b": (64, 8),
        "mistral-7b": (32, 8),
    }.items(),
)
def test_presets_have_the_heads_of_their_papers(name: str, heads: tuple[int, int]) -> None:
    spec = ModelSpec.preset(name)
    assert (spec.num_attention_heads, spec.num_key_value_heads) == heads
    assert spec.attention.scale == pytest.approx(spec.attention.head_dim**-0.5)
    assert spec.num_attention_heads * spec.attention.head_dim == spec.hidden_size


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    options = ["--heads", "8", "--width", "128", "--json", str(tmp_path / "p.json"), "--plot", str(tmp_path / "p.png")]
    done = CliRunner().invoke(application(), ["gqa", "params", *options])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "p.json").read_text())["rows"]
    assert [row["reduction"] for row in rows] == pytest.approx(list(REFERENCE.values()))
    assert "49,152" in done.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "name a model, or give --heads and --width"),
        (["gpt2", "--heads", "8"], "gpt2 has its sizes"),
        (["gpt5"], "is no folder"),
        (["gpt2", "--plot", "p.gif"], "must end in .png or .svg"),
    ],
)
def test_what_cannot_be_counted_is_refused(options: list[str], says: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(application(), ["gqa", "params", *options])
    assert done.exit_code == 2
    assert says in " ".join(done.output.split())
