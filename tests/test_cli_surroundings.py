"""The command line where its surroundings are odd: locales, closed pipes, full disks, names that hold commands."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import lyra.progress
from lyra import StaticContext
from lyra.cli import application
from lyra.cli.files import check_files
from lyra.progress import about, steps
from lyra.spec import ContextLayer, ModelSpec
from lyra.spec.errors import InputError
from lyra.spec.fingerprint import Fingerprint
from lyra.terminal import console, new_table, paragraphs, prepare_terminal, visible

EVIL = "[/nope] [bold]x\x1b[31m\x07\u202e :smile: $x^{$"
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def lyra_command(*arguments: str, **surroundings: str) -> list[str]:
    """A command line of a process with an environment of its own."""
    settings = [f"{name}={value}" for name, value in surroundings.items()]
    code = "import sys; from lyra.cli import main; main()"
    return ["env", *settings, sys.executable, "-P", "-c", code, *arguments]


def ran(*arguments: str, **surroundings: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(lyra_command(*arguments, **surroundings), capture_output=True, check=False)


# names that hold commands


def test_control_characters_are_shown_and_not_sent() -> None:
    assert visible("a\x1b[2J\n\t\x9b\u202e\udc80é") == r"a\x1b[2J\n\t\x9b\u202e\udc80é"
    assert paragraphs("a\x1b\nb\tc\r") == "a\\x1b\nb\tc\\r"


@pytest.mark.parametrize("place", ["printed", "in a cell", "in a title", "in a heading"])
def test_a_console_takes_text_for_text(place: str) -> None:
    file = io.StringIO()
    printer = console(file=file, width=120)
    if place == "printed":
        printer.print(EVIL)
    else:
        table = new_table(EVIL if place == "in a title" else None)
        table.add_column(EVIL if place == "in a heading" else "")
        table.add_row(EVIL if place == "in a cell" else "")
        printer.print(table)
    shown = "".join(file.getvalue().split())  # a title is folded to the width of its table
    assert r"[/nope][bold]x\x1b[31m\x07\u202e:smile:$x^{$" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(file.getvalue())


def test_a_context_of_an_evil_model_is_shown_as_text(tmp_path: Path) -> None:
    spec = ModelSpec.preset("gemma-3-270m").replace(name=EVIL)
    zeros = np.zeros((1, 1, 2, 256), np.float32)
    context = StaticContext(
        layers={5: ContextLayer((0,), zeros, zeros)},
        mask=np.ones((1, 2), bool),
        positions=np.arange(2)[None],
        tokens=np.arange(2)[None],
        fingerprint=Fingerprint.of(spec, {5: "0" * 64}),
    )
    path = tmp_path / "[red].safetensors"
    context.save(path)
    result = CliRunner().invoke(application(), ["inspect", str(path)], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.exception
    assert r"[/nope] [bold]x\x1b[31m\x07\u202e :smile:" in result.stdout
    assert "[red].safetensors" in "".join(result.stdout.split())
    assert "\x1b" not in result.stdout


def test_a_picture_takes_names_for_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "[x] $\\frac{1$ --><script>\x1b"
    folder.mkdir()
    toml, svg = folder / "a.toml", tmp_path / "a.svg"
    spec = ModelSpec.preset("gemma-3-270m").replace(name="$\\frac{1$ --><script>\x1b")
    spec.to_toml(toml)
    arguments = ["split", str(toml), "--svg", str(svg)]
    assert CliRunner().invoke(application(), arguments).exit_code == 0
    drawn = svg.read_text(encoding="utf-8")
    assert "<script>" not in drawn
    assert "\x1b" not in drawn
    assert "$\\frac{1$" in drawn


# odd surroundings


def test_an_ascii_locale_gets_plain_letters() -> None:
    done = ran("split", "gemma-3-12b", "--lyra-kv", "4", **ASCII)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"KV head    0   |   1   |" in done.stdout
    assert done.stdout.isascii()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("arguments", [("split", "gemma-3-12b"), ("split", "gemma-3-12b", "--json", "/dev/full")])
def test_a_full_disk_is_one_line(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(lyra_command(*arguments), stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2
    assert b"No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_pipe_ends_a_command_in_silence() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(lyra_command("schema", "report"), stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_standard_input_that_is_no_text_is_refused(tiny_folder: Path) -> None:
    result = CliRunner().invoke(application(), ["score", "-", "-m", str(tiny_folder)], input=b"\xff\xfe")
    assert result.exit_code == 2
    assert "standard input is no UTF-8 text" in result.stderr


@pytest.mark.parametrize("columns", ["0", "²", "-3", "wide", "99999999999999999999", ""])
def test_sizes_that_are_none_are_forgotten(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, columns)
    prepare_terminal()
    assert not {"COLUMNS", "LINES", "TERMINAL_WIDTH"} & set(os.environ)
    result = CliRunner().invoke(application(), ["split", "gemma-3-12b"], env={"COLUMNS": columns})
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) == 80


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lyra.cli.split.explain", greedy)
    result = CliRunner().invoke(application(), ["split", "gemma-3-12b"])
    assert (result.exit_code, result.stderr) == (2, "error: there is not enough memory; ask for less at once\n")


# files


def test_what_may_be_written_is_let_through(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("x", encoding="utf-8")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "split.json").touch()
    check_files(
        tmp_path / "out",
        None,
        Path("/dev/null"),
        tmp_path / "model" / "split.json",
        json_path=Path("-"),
        contexts=(tmp_path / "c",),
        inputs=(tmp_path / "in", "gemma-3-12b", None, tmp_path / "model"),
        folders=(tmp_path / "new" / "er", None),
    )


def test_folders_and_files_that_are_protected_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").touch()
    closed = {str(tmp_path / "old")}
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in closed)  # a superuser may write anywhere
    with pytest.raises(InputError, match="write-protected"):
        check_files(tmp_path / "old")
    check_files(tmp_path / "new")
    closed.add(str(tmp_path))
    with pytest.raises(InputError, match=r"the folder .* is write-protected"):
        check_files(tmp_path / "new")


# how far long steps are


def test_long_steps_say_in_lines_what_they_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lyra.progress, "FIRST", 0.0)
    monkeypatch.setattr(lyra.progress, "LOOK", 0.01)
    with steps("Training") as move:
        move("torch [MHA]\x1b", 1, 4)
        deadline = lyra.progress.time.monotonic() + 5
        while not (said := capsys.readouterr().err) and lyra.progress.time.monotonic() < deadline:
            lyra.progress.time.sleep(0.01)
    assert said == "Training: torch [MHA]\\x1b, 1 of 4 done\n"


def test_short_steps_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with steps("Training") as move:
        move("", 1, 4)
    assert capsys.readouterr() == ("", "")


def test_every_other_thing_is_said_at_once_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with steps("Measuring", at_once=True) as move:
        for what, done in (("one", 0), ("one: round 1", 0), ("one took 3 s", 1), ("two", 1)):
            move(what, done, 2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"Measuring: {said} of 2 done" for said in ("one, 0", "one took 3 s, 1", "two, 1")]


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (89, "89 s"), (150, "2 min"), (7800, "2 h 10 min")])
def test_times_for_people(seconds: float, said: str) -> None:
    assert about(seconds) == said
