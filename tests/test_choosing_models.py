"""Heads are chosen with models: interrupted runs, both backends, what takes the choice, the command and the suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from typer.testing import CliRunner, Result

import lyra
from lyra.choosing import ChosenSplit, judge
from lyra.choosing.measure import Measure
from lyra.cli import application
from lyra.conformance.launch import read_attention
from lyra.conformance.session import Session
from lyra.conformance.strategies import attention_specs
from lyra.errors import ModelError
from lyra.spec import HeadSplit, InputError, ModelSpec
from lyra.spec.attaching import read_split

TEXTS = [f"{name} and the other one of the {name}s, and then the end. " * 16 for name in ("hat", "note", "tone", "dot")]
SMALL: dict[str, Any] = {"context_tokens": 400, "live_tokens": 24}
SPEC = ModelSpec.preset("gemma-3-4b")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each time that the model itself is asked."""
    asked: list[int] = []
    plain = Measure._blended

    def gated(self: Measure, document: Any) -> Any:
        asked.append(1)
        return plain(self, document)

    monkeypatch.setattr(Measure, "_blended", gated)
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


def test_the_suite_is_held_to_the_splits_of_all_layers(tmp_path: Path) -> None:
    chosen = {5: HeadSplit.last_kv(SPEC, 1), 11: HeadSplit((0,), share_kv=True), 17: HeadSplit.last_kv(SPEC, 1)}
    SPEC.with_split(chosen).to_toml(tmp_path / "split.toml")
    attention, splits = read_attention(str(tmp_path / "split.toml"))
    assert set(splits) == set(chosen.values())
    assert len(splits) == 2
    scope = Session(spec=attention, splits=splits).scope
    drawn: set[HeadSplit | None] = set()

    @settings(max_examples=30, database=None)
    @given(attention_specs(scope.sizes[0], scope=scope))
    def note(spec: lyra.AttentionSpec) -> None:
        assert spec.replace(split=None) == SPEC.attention
        drawn.add(spec.split)

    note()
    assert drawn == set(splits)
