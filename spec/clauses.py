"""The clauses as data, read from SPEC.md: every property and every fault cites statements by these ids."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from .errors import SpecError


class Clause(NamedTuple):
    """A named clause: `STATIC`, its title and its statements."""

    name: str
    title: str
    statements: tuple[Statement, ...]


class Statement(NamedTuple):
    """One normative sentence: `STATIC-2`, MUST or SHOULD, and its text."""

    id: str
    level: str
    text: str

    @property
    def clause(self) -> str:
        """The clause it belongs to: `STATIC`."""
        return self.id.rpartition("-")[0]


_HEADING = re.compile(r"^## ([A-Z]+): (.+)$")
_STATEMENT = re.compile(r"^- \*\*([A-Z]+-\d+)\*\* \((MUST|SHOULD)\) (.+)$")


@cache
def clauses() -> dict[str, Clause]:
    """Every clause of SPEC.md by name, in the order of the page."""
    return parse((files("lyra.spec") / "SPEC.md").read_text(encoding="utf-8"))


@cache
def statements() -> dict[str, Statement]:
    """Every statement of SPEC.md by id, in the order of the page."""
    return {statement.id: statement for clause in clauses().values() for statement in clause.statements}


def parse(text: str) -> dict[str, Clause]:
    """Read clauses from a page. Raises SpecError where a statement stands under another clause's heading or twice."""
    found: dict[str, tuple[str, list[Statement]]] = {}
    seen: set[str] = set()
    name = ""
    for line in _joined(text):
        if heading := _HEADING.match(line):
            name = heading[1]
            found[name] = (heading[2], [])
        elif match := _STATEMENT.match(line):
            statement = Statement(*match.groups())
            if statement.clause != name or statement.id in seen:
                raise SpecError(f"SPEC.md: statement {statement.id} stands twice or under the heading {name!r}")
            seen.add(statement.id)
            found[name][1].append(statement)
    return {name: Clause(name, title, tuple(items)) for name, (title, items) in found.items()}


def _joined(text: str) -> list[str]:
    """The page's lines, a list item's continuation lines joined to its first."""
    lines: list[str] = []
    for line in text.splitlines():
        if line.startswith("  ") and lines and lines[-1].startswith("- "):
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
    return lines
