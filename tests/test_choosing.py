"""Heads are chosen by measurement: texts, candidates, rankings, what is kept of an interrupted run, and the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from typer.testing import CliRunner, Result

import lyra
from lyra.choosing import ChosenSplit, judge
from lyra.choosing.choose import curve_counts
from lyra.choosing.documents import CHOOSING, HELD_OUT, Kind, cut, set_apart
from lyra.choosing.measure import Measure
from lyra.choosing.memory import Memory
from lyra.choosing.objective import Score
from lyra.choosing.passkey import DIGITS, NAMES, passkey_document
from lyra.choosing.ranking import by_gradient, by_greedy, greedy_candidates
from lyra.choosing.units import Unit, all_units, gates_of, splits_of, units_wanted
from lyra.cli import application
from lyra.conformance.launch import read_scope
from lyra.conformance.session import Session, current, start
from lyra.conformance.strategies import attention_specs
from lyra.errors import ModelError
from lyra.spec import HeadSplit, InputError, ModelSpec, SpecError
from lyra.spec.attaching import read_split
from lyra.text import Text

TEXTS = [f"{name} and the other one of the {name}s, and then the end. " * 16 for name in ("hat", "note", "tone", "dot")]
SMALL: dict[str, Any] = {"context_tokens": 400, "live_tokens": 24}
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
    assert gates_of(SPEC, groups[1:2])[0].tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
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
    return np.array([(pairwise(gates + one) - pairwise(gates - one)) / (2 * step) for one in units]).reshape(3, 4)


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


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each time that the model itself is asked."""
    asked: list[int] = []
    plain = Measure._gated

    def gated(self: Measure, document: Any) -> Any:
        asked.append(1)
        return plain(self, document)

    monkeypatch.setattr(Measure, "_gated", gated)
    return asked


@pytest.mark.parametrize("method", ["gradient", "greedy"])
def test_an_interrupted_run_goes_on_where_it_was(
    method: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, model = counted(monkeypatch), lyra.load(tiny_folder)
    options: dict[str, Any] = {"heads": 2, "method": method, **SMALL}
    whole = lyra.choose_split(model, TEXTS[:2], **options)
    needed = len(asked)

    def interrupt(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        lyra.choose_split(model, TEXTS[:2], progress=tmp_path, on_progress=interrupt, **options)
    before = len(asked)
    (kept,) = tmp_path.iterdir()
    assert json.loads(kept.read_text())
    assert 0 < before < needed
    again = lyra.choose_split(model, TEXTS[:2], progress=tmp_path, **options)
    assert len(asked) == needed
    assert again.report.to_dict() == whole.report.to_dict()
    assert list(tmp_path.iterdir()) == []


def test_progress_of_something_else_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    Memory(path).add({"a": [1.5]})
    assert Memory(path)["a"] == [1.5]
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"kept\.json is no progress of choosing heads"):
        Memory(path)


def test_the_choice_is_what_attach_takes(tiny_folder: Path, tmp_path: Path) -> None:
    model, told = lyra.load(tiny_folder), []
    chosen = lyra.choose_split(model, TEXTS[:2], heads=3, on_progress=lambda _, *steps: told.append(steps), **SMALL)
    report = chosen.report
    assert isinstance(chosen, ChosenSplit)
    assert sum(len(split.lyra_q_heads) for split in chosen.values()) == 3 == report.point.heads
    assert [point.heads for point in report.curve] == list(range(9))
    assert report.curve[0].bytes_per_1000_tokens == 0 == report.curve[0].score
    assert report.curve[-1].score == pytest.approx(1)
    assert report.documents == {"choosing": ("text 1", "pass keys 0"), "held_out": ("text 2", "pass keys 1")}
    assert told[-1][0] == told[-1][1] == max(done for done, _ in told)
    assert dict(chosen.with_heads(8)) == {layer: HeadSplit.all(model.spec) for layer in model.spec.global_layers}
    with pytest.raises(InputError, match="9 heads were not measured"):
        chosen.with_heads(9)

    path = tmp_path / "split.toml"
    chosen.save(path)
    assert read_split(model.spec, path) == dict(chosen)
    assert model.text is not None
    ids = np.array(model.text.encode(TEXTS[1]))
    context = model.capture(ids[:400], split=path)
    assert context.kv_heads == {layer: split.lyra_kv_heads for layer, split in chosen.items()}
    live = np.concatenate([ids[:1], ids[400:424]])
    for split in (chosen, path, dict(chosen)):
        model.attach(context, split)
        assert model.score(live).mean_nll == pytest.approx(report.point.held_out["continuation"], abs=5e-6)
    model.detach()
    assert model.score(live).mean_nll == pytest.approx(report.curve[0].held_out["continuation"], abs=5e-6)
    found = judge(model, {"none": None, "chosen": path}, {"held": TEXTS[1]}, **SMALL)
    assert found["none"] == pytest.approx(report.curve[0].held_out, abs=5e-6)
    assert found["chosen"] == pytest.approx(report.point.held_out, abs=5e-6)


def test_both_backends_choose_the_same(tiny_folder: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    torch, jax = (
        lyra.choose_split(lyra.load(tiny_folder, backend=name), TEXTS[:2], heads=2, **SMALL).report
        for name in ("torch", "jax")
    )
    assert torch.order == jax.order
    assert torch.point.splits == jax.point.splits
    for one, other in zip(torch.curve, jax.curve, strict=True):
        assert one.held_out == pytest.approx(other.held_out, abs=1e-5)


def test_whole_groups_in_every_layer(tiny_folder: Path) -> None:
    model = lyra.load(tiny_folder)
    chosen = lyra.choose_split(model, TEXTS[:2], heads=2, per_layer=True, kv_aligned=True, **SMALL)
    found = {layer: (len(one.lyra_q_heads), one.is_kv_aligned) for layer, one in chosen.items()}
    assert found == dict.fromkeys(model.spec.global_layers, (2, True))
    assert [point.heads for point in chosen.report.curve] == [0, 4, 8]


def test_what_cannot_be_chosen_is_refused(tiny_folder: Path) -> None:
    model = lyra.load(tiny_folder)
    with pytest.raises(InputError, match="method is 'best'; expected one of gradient, greedy"):
        lyra.choose_split(model, TEXTS, heads=1, method="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="live_tokens is 1"):
        lyra.choose_split(model, TEXTS, heads=1, live_tokens=1)
    with pytest.raises(ModelError, match=r"without a tokenizer\.json"):
        lyra.choose_split(lyra.Model(model.engine), TEXTS, heads=1)
    model.attach(model.capture(TEXTS[0]))
    with pytest.raises(ModelError, match="a context is attached"):
        lyra.choose_split(model, TEXTS, heads=1)
    model.detach()


def lyra_command(*arguments: object) -> Result:
    words = list(map(str, arguments))
    return CliRunner().invoke(application(), words, env={"COLUMNS": "100", "NO_COLOR": "1"})


def test_the_command(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYRA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    (folder / "notes.bin").write_bytes(b"\xff")
    split, data, png, svg = (tmp_path / name for name in ("split.toml", "data.json", "heads.png", "heads.svg"))
    options = ("--texts", folder, "--heads", 2, "--context-tokens", 400, "--live-tokens", 24)
    done = lyra_command("choose", tiny_folder, *options, "-o", split, "--json", data, "--plot", png, "--plot", svg)
    assert done.exit_code == 0, done.output
    found = json.loads(data.read_text())
    assert found["documents"]["held_out"] == [str(folder / "2.txt"), "pass keys 1"]
    assert [point["heads"] for point in found["curve"]] == list(range(9))
    assert "Gain of each head alone" in done.output
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "which heads read a context" in svg.read_text()
    assert list((tmp_path / "cache" / "choosing").iterdir()) == []

    book, context = folder / "0.txt", tmp_path / "book.safetensors"
    for words in (
        ("capture", book, context, "--model", tiny_folder, "--split", split),
        ("score", book, "--model", tiny_folder, "--context", context, "--split", split),
        ("generate", "the hat", "--model", tiny_folder, "--context", context, "--split", split, "-n", 2),
        ("split", tiny_folder, "--split", split),
    ):
        done = lyra_command(*words)
        assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plot", "heads.pdf"), "pictures end in .png or .svg"),
        (("-o", "split.json"), "splits in .toml"),
        (("-o", "nowhere/split.toml"), "there is no folder"),
        (("--texts", "."), "has no file that ends in .txt"),
    ],
)
def test_what_the_command_refuses(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = lyra_command("choose", *words)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())


def test_files_and_presets_without_a_fitting_split_are_refused() -> None:
    small = ModelSpec.preset("gemma-3-270m")
    with pytest.raises(SpecError, match="gemma-3-1b has no split"):
        read_split(small, "gemma-3-1b")
    with pytest.raises(SpecError, match=r"splits layers of \(16, 8\) query and KV heads; gemma-3-270m has \(4, 1\)"):
        read_split(small, "gemma-3-12b-lyra-8q4kv")
    with pytest.raises(SpecError, match=r"is neither a \.toml file nor a preset"):
        read_split(small, "nowhere.toml")
    assert read_split(ModelSpec.preset("gemma-3-12b"), "gemma-3-12b-lyra-8q4kv") == HeadSplit(tuple(range(8, 16)))


def test_the_suite_is_held_to_the_splits_of_all_layers(tmp_path: Path) -> None:
    chosen = {5: HeadSplit.last_kv(SPEC, 1), 11: HeadSplit((0,), share_kv=True), 17: HeadSplit.last_kv(SPEC, 1)}
    SPEC.with_split(chosen).to_toml(tmp_path / "split.toml")
    scope, splits = read_scope(str(tmp_path / "split.toml"))
    assert set(splits) == set(chosen.values())
    assert len(splits) == 2
    before, session = current(), Session(scope=scope, splits=splits)
    drawn: set[HeadSplit | None] = set()

    @settings(max_examples=30, database=None)
    @given(attention_specs(session.frames[0]))
    def note(spec: lyra.AttentionSpec) -> None:
        assert spec.replace(split=None) == SPEC.attention
        drawn.add(spec.split)

    start(session)
    try:
        note()
    finally:
        start(before)
    assert drawn == set(splits)
