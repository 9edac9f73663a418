"""Bytes of keys and values: `lyra gqa cache` and what it counts with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lyra.cli import application
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec, presets
from lyra.spec.split import HeadSplit
from lyra.studies.cache import LENGTHS, calculate_kv_cache_size, context_size, full_cache_size, live_cache_size
from lyra.studies.figures import strokes

MIB = 1 << 20


def test_cache_size() -> None:
    """The figure in circulation for LLaMA-7B, 1,024 MiB at 2,048 tokens, is that of float16."""
    assert calculate_kv_cache_size(32, 32, 2048, 128, dtype="float16") == 1024 * MIB
    assert calculate_kv_cache_size(32, 32, 2048, 128, dtype="float32") == 2048 * MIB
    assert full_cache_size(ModelSpec.preset("llama-7b"), 2048) == 1024 * MIB


def test_cache_size_is_that_of_the_arrays() -> None:
    k = np.zeros((3, 2, 4, 17, 8), dtype=np.float16)  # layers, rows, KV heads, tokens, head_dim
    assert calculate_kv_cache_size(3, 4, 17, 8, batch_size=2, dtype="float16") == 2 * k.nbytes


def test_kv_heads_divide_the_cache() -> None:
    whole = calculate_kv_cache_size(32, 32, 4096, 128)
    assert [whole // calculate_kv_cache_size(32, n, 4096, 128) for n in (8, 4, 1)] == [4, 8, 32]


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "seq_len", "head_dim", "batch_size"])
def test_negative_sizes_are_refused(name: str) -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "seq_len": 1, "head_dim": 1, "batch_size": 1} | {name: -2}
    with pytest.raises(InputError, match=f"{name} is -2; expected 0 or more"):
        calculate_kv_cache_size(**sizes)
    with pytest.raises(InputError, match="dtype is 'float8'; expected one of float32, float16, bfloat16, int8"):
        calculate_kv_cache_size(1, 1, 1, 1, dtype="float8")


def test_sliding_layers_count_their_window() -> None:
    spec = ModelSpec.preset("gemma-3-12b")  # 8 of 48 layers are global, windows of 1,024, 8 KV heads of 256
    token = 2 * 8 * 256 * 2
    assert live_cache_size(spec, 1000) == full_cache_size(spec, 1000) == 48 * 1000 * token
    assert live_cache_size(spec, 131_072) == (8 * 131_072 + 40 * 1023) * token


def test_a_context_of_half_the_kv_heads_is_a_twelfth_of_a_full_cache() -> None:
    spec = ModelSpec.preset("gemma-3-12b-lyra-8q4kv")
    assert 12 * context_size(spec, 8192) == full_cache_size(spec, 8192)
    layers = list(spec.global_layers)
    mixed = spec.with_split({layers[0]: HeadSplit.last_kv(spec, 1), layers[3]: HeadSplit.last_kv(spec, 2)})
    assert context_size(mixed, 100, "float32") == 3 * 2 * 100 * 256 * 4
    assert context_size(spec.with_split(None), 100) == 0


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    written, drawn = tmp_path / "c.json", tmp_path / "c.svg"
    options = ["gemma-3-270m", "llama-7b", "--context", "--batch", "2", "--dtype", "float32"]
    done = CliRunner().invoke(application(), ["gqa", "cache", *options, "--json", str(written), "--plot", str(drawn)])
    assert done.exit_code == 0, done.output
    data = json.loads(written.read_text())
    assert (data["dtype"], data["batch"], tuple(data["tokens"])) == ("float32", 2, LENGTHS)
    assert list(data["bytes"]) == [
        "gemma-3-270m, live cache",
        "gemma-3-270m, without windows",
        "gemma-3-270m, as a context",
        "llama-7b, live cache",
        "llama-7b, as a context",
    ]
    whole, half = (data["bytes"][f"llama-7b, {name}"][2] for name in ("live cache", "as a context"))
    assert whole == 2 * 2048 * MIB
    assert whole == 4 * half
    assert drawn.read_text().startswith("<?xml")


def test_every_preset_has_a_row_and_a_line(tmp_path: Path) -> None:
    drawn = tmp_path / "c.svg"
    done = CliRunner().invoke(application(), ["gqa", "cache", "--presets", "--json", "-", "--plot", str(drawn)])
    found = json.loads(done.stdout)["bytes"]
    assert list(found) == list(presets())
    assert found["mistral-7b"][2] == live_cache_size(ModelSpec.preset("mistral-7b"), 2048)
    assert drawn.read_text().count("<!-- gemma-3-") >= 5
    strokes_seen = {(str(stroke["linestyle"]), stroke["marker"]) for stroke in strokes(len(found))}
    assert len(strokes_seen) == len(found)

    done = CliRunner().invoke(application(), ["gqa", "presets", "--json", "-"])
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert list(rows) == list(presets())
    big = rows["llama-2-70b"]
    assert (big["heads"], big["kv_heads"], big["cache_as_mha"]) == (64, 8, 8 * big["cache"])
    assert big["reduction"] == pytest.approx(7 / 8 * 2 / 3)
    assert rows["llama-7b"]["cache"] == 1024 * MIB
    assert (rows["gemma-3-12b"]["window"], rows["gemma-3-12b"]["global_layers"]) == (1024, 8)

    done = CliRunner().invoke(application(), ["gqa", "cache", "gpt2", "--presets"])
    assert done.exit_code == 2
    assert "name no model" in " ".join(done.output.split())


def test_the_four_groupings_are_the_default() -> None:
    done = CliRunner().invoke(application(), ["gqa", "cache", "--json", "-"])
    found = json.loads(done.stdout)["bytes"]
    assert {name: values[2] // MIB for name, values in found.items()} == {
        "MHA-32": 1024, "GQA-8": 256, "GQA-4": 128, "MQA": 32,
    }  # fmt: skip
