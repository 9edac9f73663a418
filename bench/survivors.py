"""Why mutants survive: mutants.toml, beside this file, and which mutants it speaks of.

    [[survivor]]
    why = "the size of a tile decides about memory and speed, not about values"
    torch = ["partial.py: SCORES_PER_TILE = $A", "partial_attention: max(1, $A // $B)"]

Each entry of a backend is a place, as edits of faults name it, and a pattern that matches once there: every mutant
whose change lies within the match is explained or, after "pattern → replacement", the one that is so made of it.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from lyra.conformance.faults.catalogue import FaultError, backend_package, place_of, sources
from lyra.conformance.faults.patterns import PatternError, check, edited

HOLE = "what_an_explanation_speaks_of"


class Explanation(NamedTuple):
    """What a mutant's canonical text begins and ends with; `behind` None where `before` is all of it."""

    file: str
    before: str
    behind: str | None

    def speaks_of(self, file: str, changed: str) -> bool:
        """Whether a file's canonical text differs from the backend's where it is explained only, and as it is."""
        if self.behind is None:
            return (file, changed) == (self.file, self.before)
        return file == self.file and changed.startswith(self.before) and changed.endswith(self.behind)


@cache
def explanations(backend: str) -> tuple[Explanation, ...]:
    """The entries of mutants.toml for a backend.

    Raises FaultError for one whose place the backend does not have, or whose pattern does not match once in it.
    """
    reasons = tomllib.loads(Path(__file__).with_name("mutants.toml").read_text(encoding="utf-8"))["survivor"]
    return tuple(_explanation(backend, entry) for reason in reasons for entry in reason.get(backend, ()))


def _explanation(backend: str, entry: str) -> Explanation:
    where, _, change = entry.partition(": ")
    find, _, made = change.partition(" → ")
    files, name = sources(backend_package(backend)), f"the survivor {entry!r} of backend {backend!r}"
    file, definition = place_of(where, files, name)
    try:
        check(find, made or HOLE)
        before, hole, behind = edited(files[file], definition, find, made or HOLE).partition(HOLE)
        return Explanation(file, before, behind if hole else None)
    except PatternError as error:
        raise FaultError(f"{name}: {error}") from None


def explained(backend: str, file: str, changed: str) -> bool:
    """Whether mutants.toml says why a backend survives with this canonical text of a file. Raises FaultError."""
    return any(one.speaks_of(file, changed) for one in explanations(backend))
