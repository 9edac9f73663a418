"""Does the suite notice a fault? Runs it against a faulty backend until the first failure.

The properties that cite a statement the fault breaks run first, then all others: a fault that the suite can kill is
killed early, by a property that says what is wrong. The first failing case settles the matter, so it is not shrunk.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pytest
from hypothesis import settings

from lyra.conformance import properties
from lyra.conformance.launch import keep_compiled
from lyra.conformance.record import Failure, Record
from lyra.conformance.registry import Declaration
from lyra.conformance.runner import forget_properties, run
from lyra.conformance.session import PROFILES, Session

from .catalogue import Fault, FaultError
from .inject import injected

Status = Literal["killed", "survived", "broken"]
SETTINGS = "lyra-faults"


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


def kill(fault: Fault, backend: str, profile: str = "smoke", seed: int = 0) -> Verdict:
    """Run the suite against one faulty backend. Raises FaultError for a dead anchor or a suite that cannot run."""
    prepare()
    record = FirstFailure()
    started = time.perf_counter()
    with injected(fault, backend) as faulty, _no_example_database():
        for only in stages_of(fault):
            session = Session(backends=[faulty], profile=PROFILES[profile], seed=seed, record=record)
            outcome = run(session, fail_fast=True, only=only)
            if record.failures:
                break
            if outcome.broke and outcome.exit_code != pytest.ExitCode.NO_TESTS_COLLECTED:
                raise FaultError(f"fault {fault.id!r}, backend {backend!r}: the suite cannot run\n{outcome.log}")
    return _verdict(fault, backend, record, time.perf_counter() - started)


def prepare() -> None:
    """Settings that must stand before a framework is imported: kept compilations, and one thread for tiny products."""
    keep_compiled()
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def stages_of(fault: Fault) -> list[str]:
    """The two halves of the suite as pytest -k expressions: properties that cite what the fault breaks, and the rest."""
    citing = " or ".join(name for name, declared in declarations().items() if set(declared.statements) & set(fault.breaks))
    return [citing, f"not ({citing})"] if citing else ["test"]


def declarations() -> dict[str, Declaration]:
    """What every property of the suite says of itself, by the name of its function."""
    found = {}
    for info in pkgutil.iter_modules(properties.__path__, f"{properties.__name__}."):
        for name, function in vars(importlib.import_module(info.name)).items():
            marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "lyra"]
            found |= {name: mark.args[0] for mark in marks}
    forget_properties()
    return found


@contextmanager
def _no_example_database() -> Iterator[None]:
    """Hypothesis without its database: a case that killed one fault must not be the first one tried on another."""
    before = settings.get_current_profile_name()
    settings.register_profile(SETTINGS, database=None)
    settings.load_profile(SETTINGS)
    try:
        yield
    finally:
        settings.load_profile(before)


def _verdict(fault: Fault, backend: str, record: Record, seconds: float) -> Verdict:
    common: dict[str, Any] = {
        "fault": fault.id,
        "clause": fault.clause,
        "backend": backend,
        "cases": record.cases,
        "seconds": round(seconds, 2),
    }
    if not record.failures:
        return Verdict(status="survived", **common)
    failure = next(iter(record.failures.values()))
    cited = [one for one in failure.statements if one in fault.breaks] or list(failure.statements)
    return Verdict(
        status="killed" if failure.kind == "failed" else "broken",
        property=failure.property,
        statement=cited[0],
        stage=failure.stage,
        message=failure.message,
        **common,
    )
