"""`lyra gqa speed`: what a layer and a model are timed at, the floor, and the table."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from gqa_command import data_of

from lyra.spec.attention import RopeSpec, grouped
from lyra.speed.row import Contestant
from lyra.studies import speed, timed
from lyra.studies.language_model import LMSpec
from lyra.studies.speed import Load, attention_operations, floor

SPEC = grouped(32, 4, 2, rope=RopeSpec(theta=10_000.0))


def test_the_floor_counts_what_must_be_read_and_multiplied() -> None:
    """Fewer KV heads leave less to read and fewer weights; the attention's own operations stay the same."""
    weights = 2 * 32 * 32 + 2 * 32 * 16
    step = floor(SPEC, "decode", Load(batch=3, tokens=100))
    assert step.read == 4 * weights + 3 * 2 * 2 * 99 * 8 * 4
    assert step.operations == 3 * (2 * weights + 4 * 4 * 8 * 100)
    whole = floor(SPEC, "prefill", Load(batch=1, tokens=10))
    assert whole.read == 4 * weights
    assert whole.operations == 2 * weights * 10 + 4 * 4 * 8 * 55

    shared = floor(SPEC.replace(num_key_value_heads=1), "decode", Load(batch=3, tokens=100))
    assert step.operations - shared.operations == 3 * 2 * (2 * 32 * 8)
    loads = [(SPEC.replace(num_key_value_heads=heads), "decode", Load(3, 100)) for heads in (4, 2, 1)]
    assert {attention_operations(*load) for load in loads} == {3 * 4 * 4 * 8 * 100}
    assert step.read - shared.read == 4 * (2 * 32 * 8) + 3 * 2 * 99 * 8 * 4


def test_every_kind_is_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame around the clock: who is timed, and what is made of the times."""
    asked = []

    class Machine:
        def drop(self) -> None:
            asked.append("drop")

    def in_turns(contestants: list[Contestant], rounds: int, workers: object) -> list[list[float]]:
        asked.append([(each.options["what"], each.options["spec"]["num_key_value_heads"]) for each in contestants])
        return [[4.0, 8.0, 4.0], [2.0, 4.0, 2.0], [1.0, 1.0, 2.0]]

    rates = {"bandwidth": 1e9, "float32": 1e9}
    monkeypatch.setattr(speed, "alternate", in_turns)
    monkeypatch.setattr(speed, "probe", lambda _: rates)
    rows = speed.measure(SPEC, (4, 2, 1), {"decode": Load(1, 64)}, ["torch"], Machine())  # type: ignore[arg-type]
    assert asked == [[("decode", 4), ("decode", 2), ("decode", 1)], "drop"]
    assert [(row["kind"], row["seconds"], row["faster"]) for row in rows] == [
        ("MHA", 4.0, 1.0), ("GQA-2", 2.0, 2.0), ("MQA", 1.0, 4.0),
    ]  # fmt: skip
    assert rows[0]["floor"] == rows[0]["read"] / 1e9
    assert 1 < rows[1]["floor_faster"] < rows[2]["floor_faster"]


@pytest.mark.parametrize("what", ["prefill", "decode", "repeated_decode", "model_decode"])
def test_both_backends_do_the_work(backend: str, what: str) -> None:
    """Each function of both modules runs, more than once, on a cache that is as long afterwards."""
    sizes = LMSpec(vocab_size=16, num_kv_heads=1, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2)
    spec = sizes.to_dict() if what == "model_decode" else SPEC.to_dict()
    work = timed.work(what, backend, spec, batch=2, tokens=16)
    for _ in range(3):
        if work.before is not None:
            work.before()
        work.run()


def test_repeating_changes_the_time_and_nothing_else(backend: str) -> None:
    plain, repeated = (
        np.asarray(timed.work(what, backend, SPEC.to_dict(), batch=2, tokens=16).run())
        for what in ("decode", "repeated_decode")
    )
    np.testing.assert_allclose(repeated, plain, atol=1e-6)
    assert plain.std() > 0.05


def test_a_decode_step_sees_the_whole_cache(backend: str) -> None:
    """The caches that are timed hold one token less than asked for, none of them masked."""
    cache = importlib.import_module(f"lyra.studies.{backend}_lm").full_cache(SPEC, 2, 16)
    (heads, head_dim), mask, positions = cache.contents()
    assert (heads, head_dim) == (2, 8)
    assert mask.all()
    np.testing.assert_array_equal(positions, np.arange(15)[None].repeat(2, axis=0))


def test_the_command_measures_and_draws(tmp_path: Path) -> None:
    sizes = "--width 32 --heads 2 --tokens 32 --prompt 16 --batch 1 --rounds 2"
    data, _ = data_of(f"speed --backend torch --threads 1 {sizes} --plot {tmp_path}/s.png", tmp_path)
    rows = data["rows"]
    assert [(row["phase"], row["kind"]) for row in rows] == [
        ("decode", "MHA"), ("decode", "MQA"), ("prefill", "MHA"), ("prefill", "MQA"),
    ]  # fmt: skip
    assert all(row["seconds"] > row["floor"] > 0 for row in rows)
    assert [row["kind"] for row in data["repeated"]] == ["MQA"]
    assert data["repeated"][0]["slower"] > 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
