"""The report as data: what `--json` writes, and what the page and the job summary are made of."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from lyra.conformance.case import Case
from lyra.conformance.record import SEVERITY, Failure, Property, Record, Status
from lyra.conformance.replay import command
from lyra.conformance.session import ProfileName, Session
from lyra.conformance.tolerance import K_PAIR, K
from lyra.spec.attention import TRACES
from lyra.spec.clauses import clauses

FORMAT: Literal[1] = 1
PACKAGES = ("lyra", "numpy", "torch", "transformers", "jax", "flax", "hypothesis", "pytest")
AGAINST_ORACLE = frozenset(name for names in TRACES.values() for name in names) | {"gradients"}
WHOLE_MODEL = ", whole model"
STATUSES: tuple[Status, ...] = ("passed", "failed", "errored", "unsupported")
PERCENTILES = (50, 90, 99, 99.9, 100)
EDGES = tuple(K * 2.0 ** (i / 2) for i in range(-18, 7))
"""Edges of the bins that |Δ|/σ is counted in: half octaves from K/512 to 8·K, K on one of them."""

Verdict = Literal["conforms", "does not conform", "cut short", "nothing compared"]


class Part(BaseModel):
    """A part of the report: no field but those named."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class BackendPart(Part):
    """A backend under test."""

    name: str
    capabilities: list[str]
    verdict: Verdict
    counts: dict[Status, int] = Field(description="properties by status")


class TallyPart(Part):
    """What one backend did in one property."""

    status: Status
    cases: int = Field(description="compared cases")
    why_unsupported: str | None


class PropertyPart(Part):
    """A property, what it cites and what every backend did in it."""

    name: str
    summary: str
    statements: list[str]
    backends: dict[str, TallyPart]


class ClausePart(Part):
    """A clause of SPEC.md: per backend how many properties that cite it ended with each status, and their cases."""

    name: str
    title: str
    properties: int
    status: dict[str, Status] = Field(description="per backend, the gravest status of its properties")
    counts: dict[str, dict[Status, int]]
    cases: dict[str, int]


class DistancePart(Part):
    """The distribution of |Δ|/σ of one kind of comparison, each comparison giving its largest element."""

    backend: str
    compared: str = Field(description="a stage against the oracle, or what the backend was compared with")
    limit: float = Field(description="a larger one is a failure")
    count: int
    not_finite: int
    percentiles: dict[str, float]
    histogram: list[int] = Field(description="below the first edge, between edges, from the last edge on or not finite")


class FailurePart(Part):
    """The smallest failing case of one backend in one property."""

    property: str
    backend: str
    statements: list[str]
    kind: Literal["failed", "errored"]
    message: str
    stage: str | None = Field(description="the first diverging stage, where one is off by itself")
    case: dict[str, Any] | str | None
    picture: str = Field(description="the case in one line")
    replay: str | None = Field(description="the file that `lyra conform --replay` reads")
    command: str | None


class Report(Part):
    """A run of the conformance suite."""

    format: Literal[1]
    ok: bool = Field(description="every backend conforms")
    complete: bool = Field(description="false where the run was cut short")
    planned: int = Field(description="properties that were to run")
    finished: int
    profile: ProfileName
    seed: int
    spec: dict[str, Any] | None = Field(description="the attention spec that the suite was held to")
    tolerance: float = Field(description="K of SPEC.md, TOLERANCE")
    backends: list[BackendPart]
    cases: int
    started: str = Field(description="ISO 8601, UTC")
    seconds: float
    cases_per_second: float
    versions: dict[str, str]
    machine: dict[str, str]
    clauses: list[ClausePart]
    properties: list[PropertyPart]
    histogram_edges: list[float]
    distances: list[DistancePart]
    failures: list[FailurePart]


def report_data(session: Session, seconds: float) -> Report:
    """Everything the run saw. `seconds` is how long it took, ending now."""
    record = session.record
    names = [backend.name for backend in session.backends]
    return Report(
        format=FORMAT,
        ok=record.ok,
        complete=record.complete,
        planned=record.planned,
        finished=record.finished,
        profile=session.profile.name,
        seed=session.seed,
        spec=session.scope.to_dict() if session.scope else None,
        tolerance=K,
        backends=[backend_part(record, one.name, one.capabilities) for one in session.backends],
        cases=record.cases,
        started=datetime.fromtimestamp(datetime.now(UTC).timestamp() - seconds, UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        cases_per_second=round(record.cases / max(record.seconds, 1e-9), 1),
        versions=versions(),
        machine={"platform": platform.platform(), "processor": platform.machine(), "byteorder": sys.byteorder},
        clauses=by_clause(record, names),
        properties=[_property(prop) for prop in record.properties.values()],
        histogram_edges=list(EDGES),
        distances=[_distances(*key, ratios) for key, ratios in record.distances.items()],
        failures=[_failure(failure) for failure in record.failures.values()],
    )


def backend_part(record: Record, name: str, capabilities: Iterable[str] = ()) -> BackendPart:
    """What became of one backend. A failure weighs more than the end of the run before its time."""
    counts = {status: record.count(status, name) for status in STATUSES}
    verdict: Verdict = "conforms"
    if counts["failed"] or counts["errored"]:
        verdict = "does not conform"
    elif not record.complete:
        verdict = "cut short"
    elif not counts["passed"]:
        verdict = "nothing compared"
    return BackendPart(name=name, capabilities=sorted(capabilities), verdict=verdict, counts=counts)


def versions() -> dict[str, str]:
    """Versions of what took part, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def by_clause(record: Record, backends: list[str]) -> list[ClausePart]:
    """Clauses that properties of the run cite, in the order of SPEC.md. A property counts for every clause it cites."""
    parts = []
    for clause in clauses().values():
        citing = [
            prop
            for prop in record.properties.values()
            if any(one.rpartition("-")[0] == clause.name for one in prop.statements)
        ]
        if not citing:
            continue
        found = {backend: [prop.tally(backend) for prop in citing] for backend in backends}
        parts.append(
            ClausePart(
                name=clause.name,
                title=clause.title,
                properties=len(citing),
                status={
                    name: max((one.status for one in tallies), key=SEVERITY.index) for name, tallies in found.items()
                },
                counts={
                    name: {status: sum(one.status == status for one in tallies) for status in STATUSES}
                    for name, tallies in found.items()
                },
                cases={name: sum(one.cases for one in tallies) for name, tallies in found.items()},
            )
        )
    return parts


def histogram(ratios: np.ndarray) -> list[int]:
    """How many ratios lie below the first edge, between two edges, and from the last on (NaN and infinity too)."""
    finite = np.where(np.isfinite(ratios), ratios, np.inf)
    return [int(count) for count in np.bincount(np.digitize(finite, EDGES), minlength=len(EDGES) + 1)]


def limit(backend: str, compared: str) -> float:
    """What the ratios of a kind of comparison may reach: K against the oracle, K·√2 between two computed values."""
    if compared.endswith(WHOLE_MODEL):
        return 1.0
    one_side = "↔" not in backend and (compared in AGAINST_ORACLE or compared.endswith(" alone"))
    return K if one_side else K_PAIR


def _property(prop: Property) -> PropertyPart:
    return PropertyPart(
        name=prop.name,
        summary=prop.summary,
        statements=list(prop.statements),
        backends={
            backend: TallyPart(status=tally.status, cases=tally.cases, why_unsupported=tally.why_unsupported or None)
            for backend, tally in prop.tallies.items()
        },
    )


def _distances(backend: str, compared: str, ratios: list[float]) -> DistancePart:
    values = np.array(ratios)
    finite = values[np.isfinite(values)]
    return DistancePart(
        backend=backend,
        compared=compared,
        limit=limit(backend, compared),
        count=len(ratios),
        not_finite=int(values.size - finite.size),
        percentiles={str(p): round(float(np.percentile(finite, p)), 4) for p in PERCENTILES} if finite.size else {},
        histogram=histogram(values),
    )


def _failure(failure: Failure) -> FailurePart:
    case: dict[str, Any] | str | None = failure.case
    picture = failure.case or "no case was compared"
    if failure.case is not None and failure.case.startswith("{"):
        case = json.loads(failure.case)
        picture = Case.from_json(failure.case).describe()
    return FailurePart(
        property=failure.property,
        backend=failure.backend,
        statements=list(failure.statements),
        kind=failure.kind,
        message=failure.message,
        stage=failure.stage,
        case=case,
        picture=picture,
        replay=failure.replay,
        command=command(failure) if failure.replay else None,
    )
