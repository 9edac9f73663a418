"""Parameters of MHA, GQA and MQA, bytes of keys and values: `lyra gqa params`, `cache` and `presets`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from gqa_command import data_of

from lyra.spec.attention import grouped
from lyra.spec.errors import InputError, SpecError
from lyra.spec.model import ModelSpec, presets
from lyra.spec.split import HeadSplit
from lyra.studies.cache import LENGTHS, calculate_kv_cache_size, context_size, full_cache_size, live_cache_size
from lyra.studies.figures import strokes
from lyra.studies.parameters import groupings, kind, projections, reduction

REFERENCE = {8: 0.0, 4: 1 / 3, 2: 0.5, 1: 7 / 12}
"""KV heads and the share of q+k+v that they save: 8 query heads, width 128."""

MIB = 1 << 20


def test_parameter_reduction() -> None:
    assert {heads: reduction(grouped(128, 8, heads)) for heads in REFERENCE} == pytest.approx(REFERENCE)
    counts = projections(grouped(128, 8, 2))
    assert counts == {"q": 16_384, "k": 4_096, "v": 4_096, "qkv": 24_576, "o": 16_384}


def test_mha_is_the_default() -> None:
    assert grouped(128, 8).num_key_value_heads == 8
    assert grouped(128, 8).head_dim == 16
    assert grouped(128, 8, head_dim=32).head_dim == 32


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((128, 8, 3), r"num_attention_heads=8 is not a multiple of num_key_value_heads=3"),
        ((130, 8), r"hidden_size=130 is not a multiple of num_heads=8; give head_dim"),
        ((128, 0), "num_heads=0"),
        ((0, 8), "hidden_size=0"),
        ((128, 8, 0), "num_key_value_heads"),
        ((128, 8, -1), "num_key_value_heads"),
    ],
)
def test_invalid_grouping(sizes: tuple[int, ...], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        grouped(*sizes)


def test_grouping() -> None:
    assert groupings(12) == (12, 6, 4, 3, 2, 1)
    assert [kind(12, n) for n in groupings(12)] == ["MHA", "GQA-6", "GQA-4", "GQA-3", "GQA-2", "MQA"]


@pytest.mark.parametrize("name", presets())
def test_parameter_count_consistency(name: str) -> None:
    """The four projections are all the weights a layer has, but for the norms of queries and keys."""
    spec = ModelSpec.preset(name).attention
    counts = projections(spec)
    shapes = (shape for key, shape in spec.weight_shapes().items() if "norm" not in key)
    assert counts["qkv"] + counts["o"] == sum(map(math.prod, shapes))
    assert 0 <= reduction(spec) < 2 / 3


PAPERS = {
    "gpt2": (12, 12), "gpt3": (96, 96), "llama-7b": (32, 32), "llama-2-7b": (32, 32), "llama-2-70b": (64, 8),
    "mistral-7b": (32, 8),
}  # fmt: skip


@pytest.mark.parametrize(("name", "heads"), PAPERS.items())
def test_presets_have_the_heads_of_their_papers(name: str, heads: tuple[int, int]) -> None:
    spec = ModelSpec.preset(name)
    assert (spec.num_attention_heads, spec.num_key_value_heads) == heads
    assert spec.attention.scale == pytest.approx(spec.attention.head_dim**-0.5)
    assert spec.num_attention_heads * spec.attention.head_dim == spec.hidden_size


def test_cache_size() -> None:
    """The figure in circulation for LLaMA-7B, 1,024 MiB at 2,048 tokens, is that of float16."""
    assert calculate_kv_cache_size(32, 32, 2048, 128, dtype="float16") == 1024 * MIB
    assert calculate_kv_cache_size(32, 32, 2048, 128, dtype="float32") == 2048 * MIB
    assert full_cache_size(ModelSpec.preset("llama-7b"), 2048) == 1024 * MIB
    k = np.zeros((3, 2, 4, 17, 8), dtype=np.float16)  # layers, rows, KV heads, tokens, head_dim
    assert calculate_kv_cache_size(3, 4, 17, 8, batch_size=2, dtype="float16") == 2 * k.nbytes
    whole = calculate_kv_cache_size(32, 32, 4096, 128)
    assert [whole // calculate_kv_cache_size(32, n, 4096, 128) for n in (8, 4, 1)] == [4, 8, 32]


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "seq_len", "head_dim", "batch_size"])
def test_negative_sizes_are_refused(name: str) -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "seq_len": 1, "head_dim": 1, "batch_size": 1} | {name: -2}
    with pytest.raises(InputError, match=f"{name} is -2; expected 0 or more"):
        calculate_kv_cache_size(**sizes)
    with pytest.raises(InputError, match="dtype is 'float8'; expected 'float32', 'float16', 'bfloat16' or 'int8'"):
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


def test_the_parameters_of_every_grouping(tmp_path: Path) -> None:
    data, printed = data_of(f"params --heads 8 --width 128 --plot {tmp_path}/p.png", tmp_path)
    assert [row["reduction"] for row in data["rows"]] == pytest.approx(list(REFERENCE.values()))
    assert "49,152" in printed
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_every_model_has_its_lines(tmp_path: Path) -> None:
    options = "--context --batch 2 --dtype float32"
    data, _ = data_of(f"cache gemma-3-270m llama-7b {options} --plot {tmp_path}/c.svg", tmp_path)
    assert (data["dtype"], data["batch"], tuple(data["tokens"])) == ("float32", 2, LENGTHS)
    assert list(data["bytes"]) == [
        "gemma-3-270m, live cache",
        "gemma-3-270m, without windows",
        "gemma-3-270m, as a context",
        "llama-7b, live cache",
        "llama-7b, as a context",
    ]
    whole, half = (data["bytes"][f"llama-7b, {name}"][2] for name in ("live cache", "as a context"))
    assert (whole, half) == (2 * 2048 * MIB, 1024 * MIB)
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")

    found = data_of("cache", tmp_path)[0]["bytes"]  # one shape in four groupings
    assert {name: values[2] // MIB for name, values in found.items()} == {
        "MHA-32": 1024, "GQA-8": 256, "GQA-4": 128, "MQA": 32,
    }  # fmt: skip


def test_every_preset_has_a_row_and_a_line(tmp_path: Path) -> None:
    found = data_of(f"cache --presets --plot {tmp_path}/c.svg", tmp_path)[0]["bytes"]
    assert list(found) == list(presets())
    assert found["mistral-7b"][2] == live_cache_size(ModelSpec.preset("mistral-7b"), 2048)
    assert (tmp_path / "c.svg").read_text().count("<!-- gemma-3-") >= 5
    assert len({(str(stroke["linestyle"]), stroke["marker"]) for stroke in strokes(len(found))}) == len(found)

    rows = {row["name"]: row for row in data_of("presets", tmp_path)[0]["rows"]}
    assert list(rows) == list(presets())
    big = rows["llama-2-70b"]
    assert (big["heads"], big["kv_heads"], big["cache_as_mha"]) == (64, 8, 8 * big["cache"])
    assert big["reduction"] == pytest.approx(7 / 8 * 2 / 3)
    assert rows["llama-7b"]["cache"] == 1024 * MIB
    assert (rows["gemma-3-12b"]["window"], rows["gemma-3-12b"]["global_layers"]) == (1024, 8)
