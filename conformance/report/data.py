"""The report as data: what `--json` writes, and what the page and the job summary are made of."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from lyra.conformance.case import Case
from lyra.conformance.record import NARROW, SEVERITY, Failure, Property, Status, rate
from lyra.conformance.replay import command
from lyra.conformance.session import PROFILES, ProfileName, Session
from lyra.conformance.tolerance import K_PAIR, K
from lyra.spec.attention import TRACES
from lyra.spec.clauses import clauses
from lyra.spec.schema import DIALECT

from .versions import versions

FORMAT: Literal[1] = 1
AGAINST_ORACLE = frozenset(name for names in TRACES.values() for name in names) | {"gradients"}
WHOLE_MODEL = ", whole model"
STATUSES: tuple[Status, ...] = ("passed", "failed", "errored", "vacuous", "unsupported")
NAMED = 12
"""Missing shards that are named."""

PERCENTILES = (50, 90, 99, 99.9, 100)
EDGES = tuple(K * 2.0 ** (i / 2) for i in range(-18, 7))
"""Edges of the bins that |Δ|/σ is counted in: half octaves from K/512 to 8·K, K on one of them."""

Verdict = Literal["conforms", "passed in this shard", "does not conform", "cut short", "nothing compared"]


class Part(BaseModel):
    """A part of the report: no field but those named."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class BackendPart(Part):
    """A backend under test."""

    name: str
    hardware: str | None = Field(None, description="what it computed on; null where it does not say")
    capabilities: list[str]
    verdict: Verdict
    counts: dict[Status, int] = Field(description="properties by status")


class TallyPart(Part):
    """What one backend did in one property."""

    status: Status = Field(description="vacuous: nothing was wrong, but a premise was never met")
    cases: int = Field(description="compared cases")
    why_unsupported: str | None
    premises: dict[str, int] = Field(
        default_factory=dict, description="in how many checks each premise of the property was met"
    )

    @property
    def unmet(self) -> list[str]:
        """The premises that were never met."""
        return [name for name, count in self.premises.items() if not count]


class PropertyPart(Part):
    """A property, what it cites and what every backend did in it."""

    name: str
    summary: str
    statements: list[str]
    premises: list[str] = Field(default_factory=list, description="what has to come up in its cases")
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
    percentiles: dict[str, float] = Field(description="of `values`, the last one exact")
    values: dict[str, int] = Field(
        description="how often every finite |Δ|/σ occurred, rounded to two digits: reports of shards add up exactly"
    )
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


class ShardsPart(Part):
    """Which parts of the suite a report is of: one, or after merging several."""

    count: int = Field(description="into how many the suite was cut")
    present: list[int] = Field(description="those that the report is of, counted from 1")
    merged: bool = Field(description="whether this is what `lyra merge` made, and should hold all of them")


class Report(Part):
    """A run of the conformance suite."""

    format: Literal[1]
    ok: bool = Field(description="every backend conforms; of a single shard, nothing in it failed")
    complete: bool = Field(description="false where the run was cut short or shards are missing")
    shards: ShardsPart | None = Field(description="null where the suite ran in one piece")
    planned: int = Field(description="properties that were to run")
    finished: int
    profile: ProfileName
    examples: int | None = Field(
        default=None, description="generated for a property of weight 1, where it is not what the profile says"
    )
    seed: int
    spec: dict[str, Any] | None = Field(description="the attention spec that the suite was held to")
    isolated: bool | None = Field(
        default=None, description="whether a case that ended its process cost no more than itself; null without a watch"
    )
    case_limit: float | None = Field(default=None, description="seconds that a case might take; null without a limit")
    tolerance: float = Field(description="K of SPEC.md, TOLERANCE")
    backends: list[BackendPart]
    cases: int
    calls: int = Field(description="that the cases are cut into")
    started: str = Field(description="ISO 8601, UTC")
    seconds: float
    property_seconds: float = Field(description="spent within properties")
    cases_per_second: float = Field(description="within properties")
    calls_per_second: float = Field(description="within properties")
    versions: dict[str, str]
    machine: dict[str, str]
    clauses: list[ClausePart]
    properties: list[PropertyPart]
    histogram_edges: list[float]
    distances: list[DistancePart]
    failures: list[FailurePart]


def how_much(report: Report) -> str:
    """What a run generated, in words: its profile, and its examples where they are others."""
    return report.profile if report.examples is None else f"{report.profile} with {report.examples} examples"


def report_data(session: Session, seconds: float) -> Report:
    """Everything the run saw. `seconds` is how long it took, ending now."""
    record, shard, cards = session.record, session.shard, session.cards
    names = [card.name for card in cards]
    parts = [_property(prop) for _, prop in sorted(record.properties.items())]
    return Report(
        format=FORMAT,
        ok=record.ok,
        complete=record.complete,
        shards=ShardsPart(count=shard.count, present=[shard.index], merged=False) if shard else None,
        planned=record.planned,
        finished=record.finished,
        profile=session.profile.name,
        examples=None if session.profile == PROFILES[session.profile.name] else session.profile.examples,
        seed=session.seed,
        spec=session.spec.to_dict() if session.spec else None,
        isolated=session.isolated,
        case_limit=session.case_limit,
        tolerance=K,
        backends=[
            backend_part(
                card.name, card.hardware, card.capabilities, parts, complete=record.complete, whole=shard is None
            )
            for card in cards
        ],
        cases=record.cases,
        calls=record.calls,
        started=datetime.fromtimestamp(datetime.now(UTC).timestamp() - seconds, UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        property_seconds=round(record.seconds, 3),
        cases_per_second=rate(record.cases, record.seconds),
        calls_per_second=rate(record.calls, record.seconds),
        versions=versions(),
        machine={"platform": platform.platform(), "processor": platform.machine(), "byteorder": sys.byteorder},
        clauses=by_clause(parts, names),
        properties=parts,
        histogram_edges=list(EDGES),
        distances=[_distances(*key, ratios) for key, ratios in sorted(record.distances.items())],
        failures=[_failure(failure, session.requested_as) for _, failure in sorted(record.failures.items())],
    )


def backend_part(
    name: str,
    hardware: str | None,
    capabilities: Iterable[str],
    properties: Sequence[PropertyPart],
    *,
    complete: bool,
    whole: bool,
) -> BackendPart:
    """What became of one backend. A failure weighs more than the end of the run before its time."""
    found = Counter(prop.backends[name].status for prop in properties if name in prop.backends)
    counts = {status: found[status] for status in STATUSES}
    verdict: Verdict = "conforms" if whole else "passed in this shard"
    if counts["failed"] or counts["errored"]:
        verdict = "does not conform"
    elif not complete:
        verdict = "cut short"
    elif not counts["passed"]:
        verdict = "nothing compared"
    return BackendPart(name=name, hardware=hardware, capabilities=sorted(capabilities), verdict=verdict, counts=counts)


def by_clause(properties: Sequence[PropertyPart], backends: Sequence[str]) -> list[ClausePart]:
    """Clauses that properties of the run cite, in the order of SPEC.md. A property counts for every clause it cites."""
    parts = []
    for clause in clauses().values():
        citing = [
            prop
            for prop in properties
            if any(statement.rpartition("-")[0] == clause.name for statement in prop.statements)
        ]
        if not citing:
            continue
        found = {name: [prop.backends[name] for prop in citing if name in prop.backends] for name in backends}
        parts.append(
            ClausePart(
                name=clause.name,
                title=clause.title,
                properties=len(citing),
                status={
                    name: max((tally.status for tally in tallies), key=SEVERITY.index, default="unsupported")
                    for name, tallies in found.items()
                },
                counts={
                    name: {status: sum(tally.status == status for tally in tallies) for status in STATUSES}
                    for name, tallies in found.items()
                },
                cases={name: sum(tally.cases for tally in tallies) for name, tallies in found.items()},
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
    compared = compared.removesuffix(NARROW)
    one_side = "↔" not in backend and (compared in AGAINST_ORACLE or compared.endswith(" alone"))
    return K if one_side else K_PAIR


def _property(prop: Property) -> PropertyPart:
    return PropertyPart(
        name=prop.name,
        summary=prop.summary,
        statements=list(prop.statements),
        premises=list(prop.premises),
        backends={
            backend: TallyPart(
                status=tally.status,
                cases=tally.cases,
                why_unsupported=tally.reason or None,
                premises=tally.met,
            )
            for backend, tally in prop.tallies.items()
        },
    )


def _distances(backend: str, compared: str, ratios: list[float]) -> DistancePart:
    finite = [ratio for ratio in ratios if math.isfinite(ratio)]
    values = Counter(f"{ratio:.2g}" for ratio in finite)
    return DistancePart(
        backend=backend,
        compared=compared,
        limit=limit(backend, compared),
        count=len(ratios),
        not_finite=len(ratios) - len(finite),
        percentiles=percentiles(values, max(finite)) if finite else {},
        values=dict(sorted(values.items(), key=lambda item: float(item[0]))),
        histogram=histogram(np.array(ratios)),
    )


def percentiles(values: Mapping[str, int], largest: float) -> dict[str, float]:
    """The smallest value that so many per cent of all do not exceed, for each of PERCENTILES; the last is `largest`."""
    ordered = sorted((float(text), count) for text, count in values.items())
    reached = np.cumsum([count for _, count in ordered])
    places = [int(np.searchsorted(reached, p / 100 * reached[-1])) for p in PERCENTILES[:-1]]
    found = {str(p): ordered[place][0] for p, place in zip(PERCENTILES, places, strict=False)}
    return found | {str(PERCENTILES[-1]): round(largest, 4)}


def alike(failures: Iterable[FailurePart]) -> list[tuple[FailurePart, list[str]]]:
    """Failures, each with the properties of others that say the same: a backend that was given up has one in each."""
    found: dict[tuple[str, str, int], tuple[FailurePart, list[str]]] = {}
    for place, failure in enumerate(failures):
        key = failure.backend, failure.message, place if failure.case is not None else -1
        if key in found:
            found[key][1].append(failure.property)
        else:
            found[key] = (failure, [])
    return list(found.values())


def report_schema() -> dict[str, Any]:
    """The JSON Schema of a report, which schema.json beside this file holds."""
    return {"$schema": DIALECT, **Report.model_json_schema()}


def vacuous(report: Report, backend: str) -> str | None:
    """The properties whose premise a backend's cases never met, each with the premise, in a sentence; None without."""
    found = [
        f"{prop.name} ({'; '.join(prop.backends[backend].unmet)})"
        for prop in report.properties
        if backend in prop.backends and prop.backends[backend].status == "vacuous"
    ]
    return f"Vacuous, since this never came up: {', '.join(found)}" if found else None


def shortfall(report: Report) -> str | None:
    """What a report lacks of the run that it is of, in a sentence; None where it lacks nothing."""
    lacks = []
    if report.shards is not None and report.shards.merged:
        missing = sorted(set(range(1, report.shards.count + 1)) - set(report.shards.present))
        if missing:
            named = ", ".join(map(str, missing[:NAMED])) + (" …" if len(missing) > NAMED else "")
            lacks.append(f"shard {named} of {report.shards.count} is missing")
    if report.finished < report.planned:
        lacks.append(f"{report.finished} of {report.planned} properties ran")
    return "; ".join(lacks) or None


def part_of(report: Report) -> str | None:
    """Which part of the suite a report is of, in words; None where it is, or should be, of the whole."""
    if report.shards is None or report.shards.merged:
        return None
    return f"shard {report.shards.present[0]} of {report.shards.count}"


def _failure(failure: Failure, requested_as: Mapping[str, str]) -> FailurePart:
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
        command=command(failure, requested_as) if failure.replay else None,
    )
