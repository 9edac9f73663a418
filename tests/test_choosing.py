"""Heads are chosen by measurement: texts, candidates, rankings, and what is kept of an interrupted run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lyra.choosing.choose import curve_counts
from lyra.choosing.documents import CHOOSING, HELD_OUT, Kind, cut, set_apart
from lyra.choosing.memory import Memory
from lyra.choosing.objective import Score
from lyra.choosing.passkey import DIGITS, NAMES, passkey_document
from lyra.choosing.ranking import by_gradient, by_greedy, greedy_candidates
from lyra.choosing.units import Unit, all_units, blends_of, splits_of, units_wanted
from lyra.spec import HeadSplit, InputError, ModelSpec, SpecError
from lyra.spec.attaching import read_split
from lyra.text import Text

SPEC = ModelSpec.preset("gemma-3-4b")


def test_default_texts_are_kept_apart() -> None:
    choosing, apart = set_apart(None, None)
    assert (tuple(choosing), tuple(apart)) == (CHOOSING, HELD_OUT)
    assert not set(choosing.values()) & set(apart.values())


def test_every_third_of_given_texts_is_held_out() -> None:
    assert set_apart(list("abcdefg"), None)[1] == {"text 3": "c", "text 6": "f"}
    assert set_apart({"x": "a", "y": "b"}, None) == ({"x": "a"}, {"y": "b"})
    assert set_apart(["a"], {"y": "b"}) == ({"text 1": "a"}, {"y": "b"})


@pytest.mark.parametrize(
    ("texts", "apart", "words"),
    [
        (["a"], None, "give two or more"),
        ([], None, "no text was given"),
        ("abc", None, "a single string"),
        (["a", "b"], ["b"], r"\['text 1'\] are also chosen on"),
    ],
)
def test_texts_that_cannot_be_kept_apart_are_refused(texts: Any, apart: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        set_apart(texts, apart)


def test_a_document_is_a_context_what_follows_and_its_start_again() -> None:
    document = cut("a", range(100), 10, 4)
    following, again = document.passages
    assert document.context == tuple(range(10))
    assert (following.ids, following.scored) == ((0, 10, 11, 12, 13), 4)
    assert (again.ids, again.scored) == ((0, 1, 2, 3), 3)
    assert cut("a", range(100), 10, 20).passages[1].ids == tuple(range(10))
    with pytest.raises(InputError, match="'a' has 13 tokens; a context of 10 and 4 more need 14"):
        cut("a", range(13), 10, 4)


def test_pass_keys_stand_in_the_context_and_only_their_digits_are_scored(tiny_folder: Path) -> None:
    text = Text.from_folder(tiny_folder)
    assert text is not None
    document = passkey_document(3, text.encode, 700)
    context = text.decode(document.context)
    assert 500 < len(document.context) <= 700
    assert len(document.passages) == len(NAMES)
    for name, passage in zip(NAMES, document.passages, strict=True):
        asked = text.decode(passage.ids)
        assert asked.startswith(f"The pass key of {name} is ")
        assert asked in context
        assert text.decode(passage.ids[-passage.scored :]).strip() == asked[-DIGITS:]
    assert passkey_document(3, text.encode, 700) == document
    assert passkey_document(4, text.encode, 700).context != document.context
    with pytest.raises(InputError, match="no room for 4 pass keys"):
        passkey_document(3, text.encode, 50)


def test_units_are_heads_or_whole_groups() -> None:
    heads, groups = all_units(SPEC, False), all_units(SPEC, True)
    assert len(heads) == 2 * len(groups) == 8 * len(SPEC.global_layers)
    assert groups[1] == Unit(SPEC.global_layers[0], (2, 3))
    assert blends_of(SPEC, groups[1:2])[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    splits = splits_of(SPEC, [heads[9], heads[3], heads[2]])
    assert {layer: (one.lyra_q_heads, one.share_kv) for layer, one in splits.items()} == {
        SPEC.global_layers[0]: ((2, 3), False),
        SPEC.global_layers[1]: ((1,), True),
    }


@pytest.mark.parametrize(
    ("heads", "per_layer", "aligned", "units"), [(3, False, False, 3), (3, True, False, 15), (4, True, True, 10)]
)
def test_how_many_units_are_wanted(heads: int, per_layer: bool, aligned: bool, units: int) -> None:
    assert units_wanted(SPEC, heads, per_layer, aligned) == units


@pytest.mark.parametrize(
    ("heads", "per_layer", "aligned", "words"),
    [(0, False, False, "1 to 40"), (9, True, False, "1 to 8"), (3, False, True, "groups of 2")],
)
def test_numbers_of_heads_that_there_are_not(heads: int, per_layer: bool, aligned: bool, words: str) -> None:
    with pytest.raises(InputError, match=words):
        units_wanted(SPEC, heads, per_layer, aligned)


def test_the_curve_has_its_ends_and_what_is_wanted() -> None:
    assert curve_counts(12, 2) == list(range(13))
    counts = curve_counts(128, 77)
    assert counts[:17] == list(range(17))
    assert {77, 128} < set(counts)
    assert len(counts) < 32


TINY = ModelSpec.preset("gemma-3-270m")
"""Three layers of four heads."""


def pairwise(gates: np.ndarray) -> float:
    """A gain that two heads have only together, beside others of their own."""
    return float(2 * gates[0, 1] * gates[1, 2] + 0.5 * gates[2, 3] + 0.3 * gates[1, 0] - 0.2 * gates[0, 0])


def pairwise_slope(_: str, gates: np.ndarray) -> np.ndarray:
    step = 1e-4
    units = np.eye(gates.size).reshape(-1, *gates.shape) * step
    return np.array([(pairwise(gates + unit) - pairwise(gates - unit)) / (2 * step) for unit in units]).reshape(3, 4)


def pairwise_scores(_: str, candidates: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([pairwise(gates) for gates in candidates])


def test_gradients_find_heads_that_gain_together_only() -> None:
    units = all_units(TINY, False)
    order = by_gradient(TINY, units, pairwise_slope, False)
    assert order[:4] == [Unit(5, (1,)), Unit(11, (2,)), Unit(17, (3,)), Unit(11, (0,))]
    assert order[-1] == Unit(5, (0,))
    assert sorted(order) == list(units)


def test_forward_selection_takes_the_best_of_each_step() -> None:
    units = all_units(TINY, False)
    order = by_greedy(TINY, units, pairwise_scores, False, 12)
    assert order[:2] == [Unit(17, (3,)), Unit(11, (0,))]
    assert order[-1] == Unit(5, (0,))
    short = by_greedy(TINY, units, pairwise_scores, False, 1)
    assert short[:2] == order[:2]
    assert sorted(short) == list(units)


@pytest.mark.parametrize("aligned", [False, True])
def test_per_layer_every_layer_gets_as_many(aligned: bool) -> None:
    units = all_units(SPEC, aligned)
    layers = len(SPEC.global_layers)

    def slope(_: str, gates: np.ndarray) -> np.ndarray:
        return np.arange(gates.size, dtype=float).reshape(gates.shape)

    def scores(_: str, candidates: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([float((gates * slope("", gates)).sum()) for gates in candidates])

    asked: list[int] = []

    def counting(what: str, candidates: Sequence[np.ndarray]) -> np.ndarray:
        asked.append(len(candidates))
        return scores(what, candidates)

    by_greedy(SPEC, units, counting, True, 12)
    assert sum(asked) == greedy_candidates(units, True, 12)
    for order in (by_gradient(SPEC, units, slope, True), by_greedy(SPEC, units, scores, True, 12)):
        for first in range(0, len(units), layers):
            assert {unit.layer for unit in order[first : first + layers]} == set(SPEC.global_layers)
        assert order[0] == units[-1]


def test_ties_go_to_the_first_head() -> None:
    units = all_units(TINY, False)

    def noise(_: str, candidates: Sequence[np.ndarray]) -> np.ndarray:
        return np.linspace(1, 1 + 1e-7, len(candidates))

    assert by_greedy(TINY, units, noise, False, 3) == list(units)


def test_a_score_is_the_share_of_what_all_heads_gain() -> None:
    none: dict[Kind, float] = {"continuation": 3.0, "recall": 4.0, "passkey": 2.0}
    every: dict[Kind, float] = {"continuation": 2.0, "recall": 1.0, "passkey": 1.0}
    both = Score("both", none, every)
    assert (both.of(none), both.of(every)) == (0, 1)
    assert both.of({**none, "recall": 2.0}) == 0.5 == both.of({**none, "recall": 2.0, "passkey": 0.0})
    assert Score("continuation", none, every).of({**every, "continuation": 2.5}) == 0.5
    assert Score("passkey", none, every).of({**none, "passkey": 1.75}) == 0.25
    gains = {kind: np.array([0.25, 0.5]) for kind in none}
    moved = both.of({kind: none[kind] - gain for kind, gain in gains.items()})
    assert both.slope({kind: -gain for kind, gain in gains.items()}) == pytest.approx(moved)


def test_where_all_heads_gain_nothing_the_score_stays_finite() -> None:
    none: dict[Kind, float] = {"continuation": 3.0, "recall": 3.0}
    assert Score("both", none, none).of({**none, "continuation": 2.0}) == 100


def test_progress_of_something_else_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    Memory(path).add({"a": [1.5]})
    assert Memory(path)["a"] == [1.5]
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"kept\.json is no progress of choosing heads"):
        Memory(path)


def test_files_and_presets_without_a_fitting_split_are_refused() -> None:
    small = ModelSpec.preset("gemma-3-270m")
    with pytest.raises(SpecError, match="gemma-3-1b has no split"):
        read_split(small, "gemma-3-1b")
    with pytest.raises(SpecError, match=r"splits layers of \(16, 8\) query and KV heads; gemma-3-270m has \(4, 1\)"):
        read_split(small, "gemma-3-12b-lyra-8q4kv")
    with pytest.raises(SpecError, match=r"is neither a \.toml file nor a preset"):
        read_split(small, "nowhere.toml")
    assert read_split(ModelSpec.preset("gemma-3-12b"), "gemma-3-12b-lyra-8q4kv") == HeadSplit(tuple(range(8, 16)))
