"""Failures are shrunk, and written to files that give them again."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from backends_for_tests import SlightlyOff, Wrapped
from judging import judged

from lyra.conformance.case import Case
from lyra.conformance.property_index import all_properties
from lyra.conformance.replay import RENAMED, Replay
from lyra.conformance.session import UsageError
from lyra.spec.attention import AttentionSpec

SMALLEST_LAYER = AttentionSpec(hidden_size=12, num_attention_heads=2, num_key_value_heads=1, head_dim=8, scale=1.0)

pytestmark = pytest.mark.usefixtures("empty_folder")


@cache
def a_failure(folder: Path) -> Path:
    """The replay file of a failure of SlightlyOff."""
    outcome = judged(SlightlyOff(), only="layer_equals_oracle")
    (failure,) = outcome.record.failures.values()
    assert failure.replay is not None
    return Path(failure.replay).resolve()


def test_shrinking_gives_a_small_case(tmp_path: Path) -> None:
    case = Replay.read(str(a_failure(tmp_path))).case
    assert case is not None
    assert case.batch == 1
    assert case.tokens <= 4
    assert (case.seed, case.start, case.padding, case.flavour) == (0, 0, (), "normal")
    assert case.spec.num_attention_heads == 2


def test_a_replay_file_gives_the_failure_again(tmp_path: Path) -> None:
    path = a_failure(tmp_path)
    recorded = json.loads(path.read_text())
    again = judged(SlightlyOff(), replay=str(path))
    assert again.record.planned == again.record.cases == 1
    (failure,) = again.record.failures.values()
    assert (failure.property, failure.message, failure.stage) == (
        recorded["property"],
        recorded["message"],
        recorded["stage"],
    )
    assert judged(Wrapped(), replay=str(path)).record.ok


def test_the_case_file_of_a_property_that_was_renamed_names_the_one_of_today(tmp_path: Path) -> None:
    for name, now in RENAMED.items():
        (tmp_path / "case.json").write_text(json.dumps({"property": name, "case": "a split"}))
        assert Replay.read(str(tmp_path / "case.json")).property == now
        assert now in all_properties()
        assert name not in all_properties()


def test_a_replay_needs_no_profile(tmp_path: Path) -> None:
    """The command that a failure prints runs its property, though that belongs to a larger profile than the default."""
    path = a_failure(tmp_path)
    fields = json.loads(path.read_text()) | {"property": "static::parts_of_a_context_merge"}
    path.write_text(json.dumps(fields))
    assert judged(Wrapped(), replay=str(path)).record.planned == 1


def test_a_failure_of_a_block_is_shrunk_and_replayed_too() -> None:
    """Its block, and the layer whose cache it shares, come back from the file."""
    outcome = judged(SlightlyOff(), only="shared_cache_equals_oracle")
    (failure,) = outcome.record.failures.values()
    assert failure.replay is not None
    recorded = Replay.read(failure.replay).case
    assert recorded is not None
    assert recorded.block is not None
    assert (recorded.block.source, recorded.batch, recorded.seed) == ("own", 1, 0)
    (again,) = judged(SlightlyOff(), replay=failure.replay).record.failures.values()
    assert (again.message, again.stage) == (failure.message, "output")
    assert judged(Wrapped(), replay=failure.replay).record.ok


ODD_CASES: dict[str, tuple[dict[str, object], str]] = {
    "no calls": ({"calls": []}, "it has no calls"),
    "calls of texts": ({"calls": ["x"]}, "a count, a position or a seed is 'x'"),
    "negative": ({"batch": -1}, "a seed is -1"),
    "fraction": ({"start": 0.5}, "a seed is 0.5"),
    "large": ({"calls": [10**9], "batch": 10**9}, "numbers, of at most"),
    "seed": ({"seed": 2**40}, "a seed is 1099511627776"),
    "flavour": ({"padding": [9, 9, 9]}, "it gives no arrays (IndexError"),
    "poison": ({"poison": "arsenic", "padding": [1]}, "it gives no arrays ("),
}


@pytest.mark.parametrize(("change", "words"), ODD_CASES.values(), ids=ODD_CASES)
def test_a_case_that_gives_no_arrays_is_refused(change: dict[str, object], words: str) -> None:
    fields = json.loads(Case(SMALLEST_LAYER).to_json()) | change
    Path("case.json").write_text(json.dumps({"property": "order::layer_equals_oracle", "case": fields}))
    with pytest.raises(UsageError, match=re.escape(words)):
        Replay.read("case.json")


@pytest.mark.parametrize(
    "data", [b"\xff", b"[" * 100_000, b"", b"[]", b'{"property": 5, "case": {}}', b'{"case": null}']
)
def test_what_is_no_case_file_is_refused(data: bytes) -> None:
    Path("case.json").write_bytes(data)
    with pytest.raises(UsageError, match="case"):
        Replay.read("case.json")
