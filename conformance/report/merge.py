"""One report out of those of the shards of a run: what one run of the whole suite would have said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lyra.conformance.record import rate
from lyra.spec.errors import InputError

from .data import DistancePart, Report, ShardsPart, backend_part, by_clause, percentiles
from .sound import read_report, sound

__all__ = ["merged", "read_report"]

SAME = ("format", "profile", "examples", "seed", "spec", "tolerance", "histogram_edges", "versions")
"""What the shards of one run have in common."""


def merged(reports: Mapping[str, Report]) -> Report:
    """The shards' reports, by a name for messages, as one. Raises InputError where they are not of one run.

    A report that lacks shards says so and is no pass.
    """
    shards = _together(reports)
    found = list(reports.values())
    first = found[0]
    names = [backend.name for backend in first.backends]
    properties = sorted((prop for report in found for prop in report.properties), key=lambda prop: prop.name)
    complete = all(report.complete for report in found) and len(shards.present) == shards.count
    backends = [
        backend_part(
            backend.name,
            _hardware(backend.name, found),
            backend.capabilities,
            properties,
            complete=complete,
            whole=True,
        )
        for backend in first.backends
    ]
    cases, calls = sum(report.cases for report in found), sum(report.calls for report in found)
    within = sum(report.property_seconds for report in found)
    whole = first.model_copy(
        update={
            "ok": all(backend.verdict == "conforms" for backend in backends),
            "complete": complete,
            "shards": shards,
            "planned": sum(report.planned for report in found),
            "finished": sum(report.finished for report in found),
            "backends": backends,
            "cases": cases,
            "calls": calls,
            "started": min(report.started for report in found),
            "seconds": round(sum(report.seconds for report in found), 3),
            "property_seconds": round(within, 3),
            "cases_per_second": rate(cases, within),
            "calls_per_second": rate(calls, within),
            "machine": _joined([report.machine for report in found]),
            "clauses": by_clause(properties, names),
            "properties": properties,
            "distances": _distances([part for report in found for part in report.distances]),
            "failures": sorted(
                (failure for report in found for failure in report.failures),
                key=lambda failure: (failure.property, failure.backend),
            ),
        }
    )
    return sound(whole, "what the reports add up to")


def _together(reports: Mapping[str, Report]) -> ShardsPart:
    """The shards that the reports are of, once they are known to be of one run."""
    present: dict[int, str] = {}
    first_name, first = next(iter(reports.items()))
    for name, report in reports.items():
        if report.shards is None:
            raise InputError(f"{name!r} is the report of a whole run; merge reports of `lyra conform --shard i/n`")
        differing = [field for field in SAME if getattr(report, field) != getattr(first, field)]
        if [(backend.name, backend.capabilities) for backend in report.backends] != [
            (backend.name, backend.capabilities) for backend in first.backends
        ]:
            differing.append("backends")
        if first.shards is not None and report.shards.count != first.shards.count:
            differing.append("number of shards")
        if differing:
            raise InputError(f"{name!r} and {first_name!r} are not of one run: they differ in {', '.join(differing)}")
        for index in report.shards.present:
            if index in present:
                raise InputError(f"shard {index} is given twice, by {present[index]!r} and {name!r}")
            present[index] = name
    judged: dict[str, str] = {}
    for name, report in reports.items():
        for prop in report.properties:
            if prop.name in judged:
                raise InputError(
                    f"{judged[prop.name]!r} and {name!r} are not of one run: both judged {prop.name!r:.100}"
                )
            judged[prop.name] = name
    assert first.shards is not None
    return ShardsPart(count=first.shards.count, present=sorted(present), merged=True)


def _distances(parts: Sequence[DistancePart]) -> list[DistancePart]:
    """Distributions of the same kind of comparison added up."""
    found: dict[tuple[str, str], DistancePart] = {}
    for part in parts:
        key = part.backend, part.compared
        found[key] = _add(found[key], part) if key in found else part
    return [part for _, part in sorted(found.items())]


def _add(first: DistancePart, other: DistancePart) -> DistancePart:
    values = Counter(first.values) + Counter(other.values)
    largest = max((part.percentiles["100"] for part in (first, other) if part.percentiles), default=0.0)
    changes: dict[str, Any] = {
        "count": first.count + other.count,
        "not_finite": first.not_finite + other.not_finite,
        "percentiles": percentiles(values, largest) if values else {},
        "values": dict(sorted(values.items(), key=lambda item: float(item[0]))),
        "histogram": [a + b for a, b in zip(first.histogram, other.histogram, strict=True)],
    }
    return first.model_copy(update=changes)


def _hardware(name: str, reports: Sequence[Report]) -> str | None:
    """What a backend computed on in any of the shards, each thing once."""
    said = (backend.hardware for report in reports for backend in report.backends if backend.name == name)
    return _once(filter(None, said)) or None


def _joined(machines: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What was said of the machines, each thing once."""
    return {key: _once(machine.get(key, "unknown") for machine in machines) for key in machines[0]}


def _once(said: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(said))
