"""A run of the suite: which backends, which profile, which spec it is held to, and what was seen."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lyra.backends.protocol import Backend, PlacedBackend
from lyra.backends.raised import interrupted
from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError
from lyra.spec.split import HeadSplit

from .case_sizes import FEWEST, CaseSizes, make_sizes
from .fit import fitting
from .journal import Journal
from .record import Record
from .registry import Declaration
from .scope import Scope
from .shard import Shard


class UsageError(InputError):
    """An option that cannot be followed: an unknown backend, spec or case."""


SEEDS = 2**32
"""Seeds are below this."""

ProfileName = Literal["smoke", "ci", "thorough"]


@dataclass(frozen=True)
class Profile:
    """How much a run does.

    examples  what is generated for a property of weight 1
    sizes    the shapes that examples come from
    data      the times that each example is checked, with other data each time: drawing it, and what a backend
              compiles for it, are then paid once
    """

    name: ProfileName
    examples: int
    sizes: int
    data: int = 1

    def includes(self, other: str) -> bool:
        """Whether a property that asks for at least profile `other` runs in this one."""
        order = list(PROFILES)
        return order.index(other) <= order.index(self.name)


PROFILES: dict[str, Profile] = {
    "smoke": Profile("smoke", examples=12, sizes=FEWEST, data=4),
    "ci": Profile("ci", examples=60, sizes=7, data=2),
    "thorough": Profile("thorough", examples=120, sizes=32, data=2),
}


@dataclass(frozen=True)
class Card:
    """What a report says of a backend; `hardware` is what it computes on, None where it does not say."""

    name: str
    capabilities: tuple[str, ...]
    hardware: str | None

    @classmethod
    def of(cls, backend: Backend) -> Card:
        """That of a backend."""
        return cls(backend.name, tuple(sorted(backend.capabilities)), _hardware_of(backend))


def _hardware_of(backend: Backend) -> str | None:
    try:
        return str(backend.hardware) if isinstance(backend, PlacedBackend) else None
    except BaseException as error:  # whatever a backend raises here, what the run found is worth more
        if interrupted(error):
            raise
        return None


@dataclass
class Session:
    """One run of the suite. Whoever starts it holds it; a pytest run keeps it in its configuration (`stash.SESSION`).

    spec      the spec that the suite is held to, if it is held to one
    splits    the splits of that spec's layers, where they differ; each case takes one of them
    requested_as  how a backend was asked for, where that is not its name
    shard     the part of the suite that is run; None means all of it
    database  the folder where Hypothesis keeps failing examples, to try them first next time; None keeps nothing
    shrink    whether a failing case is made as small as it gets, which takes many times what finding it did
    done      properties that another process of this run has judged, which are left out
    without   backends, by property, that are not asked there any more, since they ended processes in it
    lost      cases, by property and backend, that ended a process: that backend is not asked them again
    isolated  whether another process goes on where a backend ends one; None where no process watches this one
    case_limit  the seconds that a backend has for a case, if it is watched
    judged    what a report says of the backends, where they are in other processes
    planned   what every property that the options select says of itself, those of `done` too, once they are collected
    journal   where the run is, for whoever started its process
    shared    what properties make once a run and share, such as a backend's engine of a model

    Raises InputError for a seed that NumPy does not take.
    """

    backends: Sequence[Backend] = ()
    profile: Profile = PROFILES["smoke"]
    seed: int = 0
    spec: AttentionSpec | None = None
    splits: tuple[HeadSplit, ...] = ()
    record: Record = field(default_factory=Record)
    sizes: tuple[CaseSizes, ...] = ()
    requested_as: Mapping[str, str] = field(default_factory=dict)
    shard: Shard | None = None
    database: Path | None = None
    shrink: bool = True
    done: frozenset[str] = frozenset()
    without: Mapping[str, Collection[str]] = field(default_factory=dict)
    lost: Mapping[str, Mapping[str, Collection[str]]] = field(default_factory=dict)
    isolated: bool | None = None
    case_limit: float | None = None
    judged: tuple[Card, ...] = ()
    planned: Mapping[str, Declaration] = field(default_factory=dict)
    journal: Journal = field(default_factory=Journal)
    shared: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.seed, int) and 0 <= self.seed < SEEDS):
            raise InputError(f"the seed is {self.seed!r:.60}; expected a whole number from 0 to {SEEDS - 1}")
        if not self.sizes:
            self.sizes = make_sizes(self.profile.sizes, self.seed, self.spec)
        self.record.shard = self.shard

    @property
    def cards(self) -> tuple[Card, ...]:
        """What a report says of the backends."""
        return self.judged or tuple(Card.of(backend) for backend in self.backends)

    @cached_property
    def scope(self) -> Scope:
        """What its cases are drawn from: sizes that fit, where all backends have a fixed structure."""
        sizes = self.sizes if self.spec is not None else fitting(self.sizes, self.backends)
        return Scope(sizes, self.spec, self.splits, self.seed, self.profile.examples)

    def examples(self, weight: float) -> int:
        """How many examples a property of this weight gets; layers of real size get fewer."""
        count = self.profile.examples * weight
        if self.spec is not None:
            toy = 64 * 64 * 16
            size = self.spec.hidden_size * self.spec.head_dim * self.spec.num_attention_heads
            count *= min(1.0, max(0.01, 4 * toy / size))
        return max(2, round(count))
