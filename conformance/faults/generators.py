"""Faults of the suite itself: a generator made tame never meets a premise, and the property has to say so.

Each property is run once for each of its premises, on a backend that is right, with that premise kept from coming up:
in the cases it is given, and in whatever its module makes cases of. It must end vacuous, for that premise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import pytest

from lyra.backends.protocol import get_backend
from lyra.conformance.case import Case
from lyra.conformance.judge import has
from lyra.conformance.launch import prepare_environment
from lyra.conformance.premises import Premise
from lyra.conformance.property_index import all_properties
from lyra.conformance.record import Record
from lyra.conformance.registry import Declaration
from lyra.conformance.runner import run
from lyra.conformance.session import PROFILES, Profile, Session

from .catalogue import FaultError

EXAMPLES = 1
"""Cases of a property of weight 1, of two at least: none of them may meet the premise, so a few are enough."""


@dataclass(frozen=True)
class Tamed:
    """What became of a property whose generator was tame. `status` is vacuous where the premise's absence was noticed.

    Otherwise it is "passed", or "failed" or "errored" where tame cases broke the property before it could say so.
    """

    property: str
    premise: str
    backend: str
    status: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `--json` writes."""
        return asdict(self)


class Tamer:
    """A pytest plugin that runs each property, with one parameter, its `turn`-th premise kept from coming up."""

    def __init__(self, turn: int) -> None:
        self._turn = turn
        self.premises: dict[str, Premise] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep one item of every property that has so many premises."""
        firsts = {declaration.check: item for item in reversed(items) if (declaration := declaration_of(item))}
        items[:] = [item for item in items if item in firsts.values() and len(premises_of(item)) > self._turn]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[Any]:
        """Run the property with tame cases."""
        declaration = declaration_of(item)
        assert declaration is not None
        with tamed(declaration.premises[self._turn], declaration):
            return (yield)


def declaration_of(item: pytest.Item) -> Declaration | None:
    """What a property says of itself."""
    marker = item.get_closest_marker("lyra")
    return marker.args[0] if marker else None


def premises_of(item: pytest.Item) -> tuple[Premise, ...]:
    """The premises of a property."""
    declaration = declaration_of(item)
    return declaration.premises if declaration else ()


@contextmanager
def tamed(premise: Premise, declaration: Declaration) -> Iterator[None]:
    """Keep a premise of a property from coming up: in cases as they are drawn, and again as arrays are made of them."""
    tame, drawn, problem_of = premise.tame, Case.with_other_data, Case.problem
    with ExitStack() as stack:
        if premise.names:
            stack.enter_context(patch.dict(declaration.check.__globals__, premise.names))
        if tame is not None:
            stack.enter_context(patch.object(Case, "with_other_data", lambda case, index: tame(drawn(case, index))))
            stack.enter_context(patch.object(Case, "problem", lambda case: problem_of(tame(case))))
        yield


def tame_everywhere(backends: Sequence[str], profile: str = "smoke", seed: int = 0) -> list[Tamed]:
    """The same for every property that one of the backends can do: by the first that can. Raises as `tame_all` does."""
    settled: list[Tamed] = []
    known = all_properties()
    left = list(known)
    for backend in backends:
        asked = get_backend(backend)
        able = [name for name in left if all(has(asked, need) for need in known[name].needs)]
        if able:
            settled += tame_all(backend, profile, seed, "test" if len(left) == len(known) else " or ".join(able))
        left = [name for name in left if name not in able]
    return settled


def tame_all(backend: str = "torch", profile: str = "smoke", seed: int = 0, only: str = "test") -> list[Tamed]:
    """Every property of a profile with each of its premises kept from coming up, on one backend.

    `only` names the properties, as --only does; those that ask for what the backend cannot do are left out. Raises
    FaultError where the suite cannot run.
    """
    prepare_environment()
    settled: list[Tamed] = []
    few = Profile(PROFILES[profile].name, EXAMPLES, PROFILES[profile].sizes, data=1)
    turn = 0
    while True:
        record = Record()
        session = Session([get_backend(backend)], few, seed, database=None, record=record, shrink=False)
        outcome = run(session, only=only, plugins=[Tamer(turn)])
        if outcome.found_nothing:
            return settled
        if outcome.could_not_run:
            raise FaultError(f"backend {backend!r}: the suite cannot run on tame cases\n{outcome.log}")
        for name, prop in record.properties.items():
            tally = prop.tally(backend)
            if tally.status == "unsupported":
                continue
            premise = prop.premises[turn]
            missed = tally.status != "vacuous" or premise in tally.unmet
            settled.append(Tamed(name, premise, backend, tally.status if missed else "passed"))
        turn += 1
