"""What a row of the benchmark is, as data: who is timed against whom, and what is expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Framework = Literal["torch", "jax"]
"""Which worker process a contestant runs in: neither's threads and memory are to matter to the other."""

BACKENDS: dict[Framework, str] = {"torch": "PyTorch", "jax": "JAX"}
"""What people call them."""


class Work(NamedTuple):
    """What a contestant does. run() returns when its result is there; before() is called untimed ahead of every run."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Contestant:
    """One way to do the work of a row.

    `make` is "module:function" of a function that takes `options` (plain data) and returns a Work. It is imported in
    the worker, so that a row's own file needs no framework.
    """

    name: str
    framework: Framework
    make: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rival:
    """Another contestant, and how many times its time the subject's must fit into, at least; None: it is only shown.

    `per` divides the rival's time, `own_per` the subject's: where they do different amounts of work, costs per unit of
    it are compared.
    """

    contestant: Contestant
    at_least: float | None = None
    per: float = 1.0
    own_per: float = 1.0


@dataclass(frozen=True)
class Floor:
    """What no implementation can avoid: bytes to be read, and floating-point operations of matrix products.

    The floor's time is the longer of the two at this machine's own rates; `at_most` is how many times it is allowed.
    """

    read: int
    operations: int = 0
    at_most: float | None = None


@dataclass(frozen=True)
class Race:
    """A subject timed in turns with its rivals. The ratio of each round is taken, and their median."""

    name: str
    what: str
    subject: Contestant
    rivals: tuple[Rival, ...]
    floor: Floor | None = None
    quick: bool = False
    """Whether it is part of the short report that CI makes."""
    rounds: int = 15
    note: str = ""
    """What the page says below the row: method where it differs, what limits it."""


@dataclass(frozen=True)
class Count:
    """A row of figures that are no times: bytes, nats. `make` ("module:function") gives a Counted, in a worker."""

    name: str
    what: str
    framework: Framework
    make: str
    options: Mapping[str, Any] = field(default_factory=dict)
    quick: bool = False
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """One figure of a row, with the bound that it is held to, if any; low and high are the quartiles of its rounds."""

    what: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bound is kept; None without one."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    def within(self, margin: float) -> bool:
        """Whether the bound, made wider by a factor, is kept."""
        if self.at_least is not None:
            return self.value * margin >= self.at_least
        return self.at_most is None or self.value <= self.at_most * margin


class Counted(NamedTuple):
    """What a Count gives: findings, and a table (the head first) where there is more to show."""

    findings: list[Finding]
    table: list[list[str]] | None = None


@dataclass(frozen=True)
class Line:
    """A line of a sweep: a contestant, one of whose options is set to every point up to `end` in turn."""

    contestant: Contestant
    end: float = float("inf")


@dataclass(frozen=True)
class Sweep:
    """Costs that grow: every line at every point, in turns. `option` is the contestants' option that the points set."""

    name: str
    what: str
    option: str
    points: tuple[int, ...]
    lines: tuple[Line, ...]
    floor: Callable[[int], Floor] | None = None
    rounds: int = 5
    quick: bool = False
    note: str = ""


Row = Race | Count | Sweep
