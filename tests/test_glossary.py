"""What docs/glossary.md names is there, and no word stands in it twice."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


WORDS = [row for heading in ("Attention", "Judging") for row in rows(heading)]
PLACES = sorted({place for row in WORDS for place in re.findall(r"`([^`]+)`", row[2])})


def there(place: str) -> bool:
    """Whether a file, a folder, or what a dotted name imports is there."""
    if "/" in place:
        return (ROOT / place).exists()
    module, _, name = place.rpartition(".")
    return hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("place", PLACES)
def test_every_place_is_there(place: str) -> None:
    assert there(place)


def test_a_place_that_is_not_there_is_seen() -> None:
    assert not there("spec/gates.py")
    assert not there("lyra.spec.Gates")


def test_every_word_has_a_meaning_and_a_place_and_stands_once() -> None:
    assert all(len(row) == 3 and all(row) and "`" in row[2] for row in WORDS)
    words = [word.strip() for row in WORDS for word in row[0].split(",")]
    assert sorted(words) == sorted(set(words))
    assert {"block", "gate", "blend", "chunk", "tile", "attach", "inject"} <= set(words)


def test_the_axes_are_those_of_the_signatures() -> None:
    """An axis in the signatures of the numeric core that begins with a capital letter is in the table."""
    from conftest import CORE

    known = {axis.strip() for row in rows("Axes") for axis in row[0].split(",")}
    for name in CORE:
        source = Path(str(importlib.import_module(name).__file__)).read_text(encoding="utf-8")
        for axes in re.findall(r'(?:Float|Bool|Int|Shaped)\[[\w.]+, "([^"]+)"\]', source):
            found = set(re.findall(r"\b[A-Z]\w*", re.sub(r"\{.*?\}", "", axes)))
            assert found <= known, f"{name}: {axes}"
