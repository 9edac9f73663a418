"""What the backends were asked within one check, so that every input is held to the oracle and counted once."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .case import Problem


@dataclass
class RecordedInput:
    """One input, cut into `calls`, and what each backend answered: all live tokens, the first time it was asked.

    `held` names the backends whose answers were compared with the oracle's; `facts` is what is known of premises.
    """

    problem: Problem
    calls: tuple[int, ...]
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    facts: dict[str, bool] = field(default_factory=dict)


class RecordedInputs:
    """The inputs of one check. Two are the same where arrays, spec and the cut into calls are."""

    def __init__(self) -> None:
        self._inputs: list[RecordedInput] = []

    def note(self, problem: Problem, calls: tuple[int, ...]) -> RecordedInput:
        """The input that a backend is asked; what is remembered of the same arrays, the oracle's values, is shared."""
        found = None
        for recorded in self._inputs:
            if problem.same_as(recorded.problem):
                problem.memo.update(recorded.problem.memo)
                found = found or (recorded if recorded.calls == calls else None)
        if found is None:
            self._inputs.append(found := RecordedInput(problem, calls))
        return found

    def compared(self, backends: list[str]) -> list[RecordedInput]:
        """Those that all of these backends were asked and held to the oracle for."""
        return [recorded for recorded in self._inputs if recorded.held.issuperset(backends)]
