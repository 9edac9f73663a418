"""The walks of CONTRIBUTING.md, each done once in a copy of the tree: what the page says happens, happens."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from test_docs import LINK, run_command

from lyra.conformance.faults.catalogue import catalogue
from lyra.conformance.property_index import all_properties
from lyra.speed.rows import all_rows

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEP = re.compile(r"((?:^(?!```)[^\n]+\n)*)\n?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`([\w.-]+(?:/[\w.-]+)+)`")
MOST_FILES = {"A clause": 6, "A live mode": 9, "A family": 8}
"""How many files a walk may touch."""


class Step(NamedTuple):
    """One block of a walk: commands with what they print, or what is done to a file."""

    path: str | None
    language: str
    text: str


def section(heading: str) -> str:
    """The text below a heading of the third level."""
    return PAGE.partition(f"\n### {heading}\n")[2].partition("\n### ")[0].partition("\n## ")[0]


def steps(heading: str) -> list[Step]:
    """The blocks of a walk, in order; a file is the last one that the paragraph above names."""
    found = STEP.finditer(section(heading))
    return [
        Step(next(iter(FILE.findall(above)[::-1]), None), *rest) for above, *rest in (match.groups() for match in found)
    ]


def files(heading: str) -> list[str]:
    """The files that a walk touches, as its list at the top says."""
    first = section(heading).lstrip("\n").partition("\n\n")[0]
    return FILE.findall(first)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, and beside it a folder with a package `lyra` made of it."""
    there = tmp_path_factory.mktemp("tree")
    hidden = shutil.ignore_patterns("__pycache__", ".*", "build", "images", "*.html")
    shutil.copytree(ROOT, there / "tree", ignore=hidden)
    package = there / "site" / "lyra"
    package.mkdir(parents=True)
    mapped = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    for entry in (there / "tree" / mapped.pop("lyra")).iterdir():
        (package / entry.name).symlink_to(entry)
    for name, folder in mapped.items():
        (package / name.removeprefix("lyra.")).symlink_to(there / "tree" / folder)
    return there


@pytest.fixture
def tree(copy: Path) -> Iterator[Path]:
    """The copy, put back as it was when a walk is over."""
    yield copy / "tree"
    for path in sorted((copy / "tree").rglob("*")):
        original = ROOT / path.relative_to(copy / "tree")
        if path.is_file() and "__pycache__" not in path.parts:
            if not original.is_file():
                path.unlink()
            elif path.stat().st_mtime_ns != original.stat().st_mtime_ns:
                shutil.copy2(original, path)


def edit(tree: Path, step: Step) -> None:
    """Do to a file what a block says: a diff replaces the lines that it shows, anything else goes to the end."""
    assert step.path is not None, f"no file is named above {step.text!r}"
    path = tree / step.path
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if step.language == "diff":
        lines = step.text.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if not line.startswith("+"))
        new = "".join(line[1:] for line in lines if not line.startswith("-"))
        assert before.count(old) == 1, f"{step.path} has {before.count(old)} places like\n{old}"
        after = before.replace(old, new)
    else:
        after = f"{before.rstrip()}\n\n\n{step.text}" if before else step.text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(after, encoding="utf-8")


PROGRAMS = {
    "make": ["make", "--silent", "INSTALLED=pyproject.toml", f"BIN={Path(sys.executable).parent}"],
    "lyra": [sys.executable, "-P", "-c", "from lyra.cli import main; main()"],
    "pytest": [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider"],
    "python": [sys.executable, "-P"],
}


def run(tree: Path, text: str) -> None:
    """Run the commands of a console block: what they print holds the lines that are shown, in order."""
    for block in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *shown = block.splitlines()
        words = shlex.split(command)
        environment = {**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        paths = [str(tree.parent / "site"), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run(
            [*PROGRAMS[words[0]], *words[1:]],
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            check=False,
        )
        assert (done.returncode != 0) == any("failed" in line for line in shown), f"$ {command}\n{done.stdout}"
        printed = " ".join(done.stdout.split())
        wanted = [" ".join(part.split()) for line in shown for part in line.split("…") if part.strip()]
        place = 0
        for part in wanted:
            place = printed.find(part, place)
            assert place >= 0, f"$ {command}\nprinted no {part!r}:\n{done.stdout}"


WALKS = re.findall(r"^### (.+)$", PAGE.partition("\n## Walks\n")[2].partition("\n## ")[0], re.MULTILINE)


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_ends_where_the_page_says(walk: str, tree: Path) -> None:
    taken = steps(walk)
    assert any(step.language == "console" for step in taken)
    for step in taken:
        run(tree, step.text) if step.language == "console" else edit(tree, step)


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_touches_the_files_that_it_lists(walk: str) -> None:
    touched = {step.path for step in steps(walk) if step.language != "console"}
    listed = files(walk)
    assert touched <= set(listed)
    assert len(listed) <= MOST_FILES.get(walk, len(listed))
    known = [path for path in listed if (ROOT / path).exists() or path in touched]
    assert known == listed


def test_what_is_to_be_run_can_be_run() -> None:
    """Every command of the table knows its options, and what it names is there."""
    table = PAGE.partition("\n## Running one thing\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^\| .*? \| `(.*?)` \|", table, re.MULTILINE)
    assert len(commands) >= 10
    for command in commands:
        run_command(command)
        _, *words = shlex.split(command)
        chosen = [words[place + 1] for place, word in enumerate(words) if word in {"--only", "-k"}]
        known = "\n".join([*all_properties(), *catalogue(), *(row.name for row in all_rows())])
        assert all(name in known or words[0].startswith("tests/") for name in chosen), command


def test_links_lead_somewhere() -> None:
    for target in LINK.findall(PAGE):
        assert (ROOT / target).exists(), target


def test_the_house_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    script, drawn = ROOT / "docs" / "images" / "draw_house.py", tmp_path / "house.svg"
    subprocess.run([sys.executable, "-P", script, drawn], check=True, env={**os.environ, "MPLBACKEND": "svg"})
    words = re.compile(r"<!-- (.*?) -->")
    shown = words.findall((script.parent / "house.svg").read_text(encoding="utf-8"))
    assert words.findall(drawn.read_text(encoding="utf-8")) == shown
    assert "conformance/" in shown


def test_every_walk_is_there() -> None:
    assert [*WALKS] == ["A clause", "A live mode", "A family", "A backend", "A fault", "A subject"]


def test_a_line_that_is_not_printed_is_seen(tree: Path) -> None:
    run(tree, "$ python -c 'print(1, 2)'\n1 … 2\n")
    with pytest.raises(AssertionError, match="printed no '2 1'"):
        run(tree, "$ python -c 'print(1, 2)'\n2 1\n")
