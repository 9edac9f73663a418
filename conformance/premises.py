"""What a property is about has to come up in its cases: a property whose premise was never met has shown nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .asked import Input
from .case import Case


@dataclass(frozen=True)
class Premise:
    """A condition that a property is named for, looked for in everything that a backend is asked within a check.

    name   how it reads in a table: "a group is cut"
    holds  whether an input of a backend meets it; None where the property says so itself (`Judge.meet`)
    tame   a case as a generator would make it that never meets the premise: what shows that its absence is noticed
    names  the same for a property that generates no case: what stands in its module instead
    """

    name: str
    holds: Callable[[Input], bool] | None = None
    tame: Callable[[Case], Case] | None = None
    names: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def met_by(self, asked: Input) -> bool:
        """Whether an input meets it, found out once."""
        if self.holds is None:
            return False
        if self.name not in asked.facts:
            asked.facts[self.name] = bool(self.holds(asked))
        return asked.facts[self.name]
