"""Does the suite notice a fault? Runs it against a faulty backend until the first failure.

The properties that cite a statement the fault breaks run first, then all others: a fault that the suite can kill is
killed early, by a property that says what is wrong. The first failing case settles the matter, so it is not shrunk.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import pytest

from lyra.backends.protocol import Backend, get_backend
from lyra.conformance.launch import prepare_environment
from lyra.conformance.property_index import all_properties
from lyra.conformance.record import Failure, Record
from lyra.conformance.runner import run
from lyra.conformance.session import PROFILES, Session

from .catalogue import Fault, FaultError
from .inject import injected

Status = Literal["killed", "survived", "broken"]


@dataclass(frozen=True)
class Verdict:
    """What became of a fault in a backend.

    killed    a property failed: which one, the statement it cites, the first diverging stage if one is off by itself
    survived  the whole suite passed: it has a hole, or the fault is none
    broken    the backend raised instead of answering, so nothing can be learnt: the catalogue has a defect
    cases     compared until the verdict
    """

    fault: str
    clause: str
    backend: str
    status: Status
    cases: int
    seconds: float
    property: str | None = None
    statement: str | None = None
    stage: str | None = None
    message: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `--json` writes."""
        return asdict(self)


class FirstFailure(Record):
    """A record that ends the run at the first failure; pytest's own -x would wait until the case is shrunk."""

    def fail(self, failure: Failure) -> None:
        """Keep the failure and stop pytest."""
        super().fail(failure)
        pytest.exit(f"{failure.property} failed", returncode=pytest.ExitCode.TESTS_FAILED)


def kill(fault: Fault, backend: str, profile: str = "smoke", seed: int = 0, only: str = "test") -> Verdict:
    """Run the suite against one faulty backend, at most until the first failure.

    `only` names the properties to run, all of them by default, as --only does.
    Raises FaultError for a dead anchor, for a suite that cannot run, and where the property that fails does so on the
    unchanged backend too.
    """
    prepare_environment()
    record = FirstFailure()
    started = time.perf_counter()
    with injected(fault, backend) as faulty:
        for stage in stages_of(fault):
            _run(faulty, profile, seed, f"({stage}) and ({only})", record)
            if record.failures:
                break
    seconds = time.perf_counter() - started
    if not record.cases:
        raise FaultError(
            f"fault {fault.id!r}, backend {backend!r}: the suite compared nothing, so nothing has survived"
        )
    failure = next(iter(record.failures.values()), None)
    if failure is not None and not holds(failure.property, backend, profile, seed):
        raise FaultError(
            f"{failure.property} fails on the unchanged backend {backend!r} too, so it says nothing about fault "
            f"{fault.id!r}: run `lyra conform --backend {backend} --profile {profile} --seed {seed}` first"
        )
    return _verdict(fault, backend, record.cases, failure, seconds)


@cache
def holds(property_name: str, backend: str, profile: str, seed: int) -> bool:
    """The control: whether a property that killed a fault passes on the backend without the fault."""
    record = FirstFailure()
    _run(get_backend(backend), profile, seed, property_name.partition("[")[0], record)
    return not record.failures


def _run(backend: Backend, profile: str, seed: int, only: str, record: Record) -> None:
    """Run some of the properties, in this process, and keep no example: a case that killed one fault must not be the
    first one tried on another.
    """
    session = Session(backends=[backend], profile=PROFILES[profile], seed=seed, database=None, record=record)
    outcome = run(session, fail_fast=True, only=only)
    unexplained = outcome.exit_code == pytest.ExitCode.TESTS_FAILED and not record.failures
    if unexplained or (outcome.could_not_run and outcome.exit_code != pytest.ExitCode.NO_TESTS_COLLECTED):
        raise FaultError(f"backend {backend.name!r}: the suite cannot run (--only {only!r})\n{outcome.log}")


def stages_of(fault: Fault) -> list[str]:
    """The suite in three parts, as --only expressions, the likeliest to kill a fault first.

    The properties of the fault's own clause that cite a statement it breaks, others that cite one, all others.
    """
    citing = sorted(name for name, said in declarations().items() if set(said.statements) & set(fault.breaks))
    home = f"{fault.clause.lower()}::"
    first = [name for name in citing if name.startswith(home)]
    then = [name for name in citing if not name.startswith(home)]
    stages: list[str] = []
    for names in (first, then):
        if names:
            stages.append(_but(" or ".join(names), stages))
    return [*stages, _but("test", stages)]


def _but(wanted: str, without: list[str]) -> str:
    """An expression of what `wanted` matches and none of the others does."""
    return " and ".join([f"({wanted})", *(f"not ({other})" for other in without)])


declarations = cache(all_properties)
"""What every property of the suite says of itself, found once for all faults."""


def _verdict(fault: Fault, backend: str, cases: int, failure: Failure | None, seconds: float) -> Verdict:
    common: dict[str, Any] = {
        "fault": fault.id,
        "clause": fault.clause,
        "backend": backend,
        "cases": cases,
        "seconds": round(seconds, 2),
    }
    if failure is None:
        return Verdict(status="survived", **common)
    cited = [statement for statement in failure.statements if statement in fault.breaks] or list(failure.statements)
    return Verdict(
        status="killed" if failure.kind == "failed" else "broken",
        property=failure.property,
        statement=cited[0],
        stage=failure.stage,
        message=failure.message,
        **common,
    )
