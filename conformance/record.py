"""What a run saw: per property and backend how many cases, the largest |Δ|/σ, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from lyra.backends.raised import raised

from .shard import Shard

Status = Literal["passed", "failed", "errored", "vacuous", "unsupported"]
SEVERITY: tuple[Status, ...] = ("unsupported", "passed", "vacuous", "failed", "errored")

BY_ITSELF = "the property itself"
"""Stands in the message of an error that is no backend's."""

NARROW = ", bfloat16"
"""Ends the name of what was compared in bfloat16, where σ is another one (TOLERANCE-4)."""


@dataclass(frozen=True)
class Failure:
    """One failure: what a person needs to see it again."""

    property: str
    backend: str
    statements: tuple[str, ...]
    kind: Literal["failed", "errored"]
    message: str
    stage: str | None
    case: str | None
    replay: str | None = None


@dataclass
class Tally:
    """What one backend did in one property. `met` counts the checks in which each of its premises was met.

    misfit  why a case was not asked of a backend of fixed structure, if there was one
    """

    cases: int = 0
    marked: Status = "unsupported"
    why_unsupported: str = ""
    misfit: str = ""
    met: dict[str, int] = field(default_factory=dict)

    def mark(self, status: Status) -> None:
        """Keep the graver of the old and the new mark."""
        if SEVERITY.index(status) > SEVERITY.index(self.marked):
            self.marked = status

    def add(self, other: Tally) -> None:
        """Take in what another process saw of the same backend in the same property: other cases of it."""
        self.cases += other.cases
        self.mark(other.marked)
        self.why_unsupported = self.why_unsupported or other.why_unsupported
        self.misfit = self.misfit or other.misfit
        for name, count in other.met.items():
            self.met[name] = self.met.get(name, 0) + count

    @property
    def unmet(self) -> tuple[str, ...]:
        """The premises that never came up."""
        return tuple(name for name, count in self.met.items() if not count)

    @property
    def status(self) -> Status:
        """What became of the property: it was marked so; without what it is about nothing has passed.

        Where that could not come up, since the cases with it do not fit the backend, the property is unsupported.
        """
        if self.marked == "passed" and self.unmet:
            return "unsupported" if self.misfit else "vacuous"
        return self.marked

    @property
    def reason(self) -> str:
        """Why the property is unsupported; nothing where it is not."""
        if self.status != "unsupported":
            return ""
        return self.why_unsupported or (f"does not fit: {self.misfit}" if self.misfit else "")


@dataclass
class Property:
    """A property of the suite, as registered by its decorator. `premises` are the names of its premises."""

    name: str
    statements: tuple[str, ...]
    summary: str
    premises: tuple[str, ...] = ()
    tallies: dict[str, Tally] = field(default_factory=dict)

    def tally(self, backend: str) -> Tally:
        """The tally of a backend, made on first use."""
        return self.tallies.setdefault(backend, Tally(met=dict.fromkeys(self.premises, 0)))


@dataclass
class Record:
    """Everything a run saw. `distances` are the largest |Δ|/σ of single comparisons, by backend and stage.

    calls are those that the cases are cut into. planned and finished count properties: a run that ended before all were
    done was cut short. `shard` is the part of the suite that ran, if not all of it.
    """

    properties: dict[str, Property] = field(default_factory=dict)
    failures: dict[tuple[str, str], Failure] = field(default_factory=dict)
    distances: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    cases: int = 0
    calls: int = 0
    seconds: float = 0.0
    planned: int = 0
    finished: int = 0
    shard: Shard | None = None

    def register(self, name: str, statements: Iterable[str], summary: str, premises: Iterable[str] = ()) -> Property:
        """The record of a property, made on first use."""
        return self.properties.setdefault(name, Property(name, tuple(statements), summary, tuple(premises)))

    def fail(self, failure: Failure) -> None:
        """Keep the latest failure of a property on a backend: while Hypothesis shrinks, the latest is the smallest."""
        self.failures[failure.property, failure.backend] = failure
        self.properties[failure.property].tally(failure.backend).mark(failure.kind)

    def suite_error(self, name: str, error: BaseException) -> None:
        """A property raised by itself, outside every backend: an error of all backends that it was to judge."""
        prop = self.properties[name]
        for backend, tally in prop.tallies.items():
            if not tally.why_unsupported:
                message = f"{BY_ITSELF} raised {raised(error)}"
                self.fail(Failure(name, backend, prop.statements, "errored", message, stage=None, case=None))

    def left_out(self, name: str, reason: str) -> None:
        """A property was skipped: keep why, for every backend that had nothing compared."""
        for tally in self.properties[name].tallies.values():
            if tally.status == "unsupported":
                tally.why_unsupported = tally.why_unsupported or reason

    def observe(self, backend: str, stage: str, ratio: float) -> None:
        """Keep one |Δ|/σ."""
        self.distances.setdefault((backend, stage), []).append(ratio)

    def add(self, other: Record) -> None:
        """Take in what another process saw of the same run: other properties, or other cases in one of them."""
        for name, prop in other.properties.items():
            own = self.register(name, prop.statements, prop.summary, prop.premises)
            for backend, tally in prop.tallies.items():
                own.tally(backend).add(tally)
        self.failures |= other.failures
        for key, ratios in other.distances.items():
            self.distances.setdefault(key, []).extend(ratios)
        self.cases += other.cases
        self.calls += other.calls
        self.seconds += other.seconds
        self.planned = max(self.planned, other.planned)
        self.finished += other.finished

    @property
    def complete(self) -> bool:
        """Whether every property that was to run has run."""
        return self.finished == self.planned

    @property
    def ok(self) -> bool:
        """Whether every backend had something compared, nothing failed or errored, and the run was not cut short.

        A shard may hold nothing that a backend has the capabilities for: the others have, or the merged report says so.
        """
        backends = {backend for prop in self.properties.values() for backend in prop.tallies}
        compared = bool(backends) and (
            self.shard is not None or all(self.count("passed", backend) for backend in backends)
        )
        return not self.failures and compared and self.complete

    def count(self, status: Status, backend: str | None = None) -> int:
        """How many properties ended with a status on a backend; on all of them together without one."""
        return sum(
            tally.status == status
            for prop in self.properties.values()
            for name, tally in prop.tallies.items()
            if backend in (None, name)
        )


def rate(count: int, seconds: float) -> float:
    """So many a second."""
    return round(count / max(seconds, 1e-3), 1)
