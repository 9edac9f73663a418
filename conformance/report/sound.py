"""Reads reports, and believes none that contradicts itself: what it sums up is counted again from its properties."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lyra.conformance.case import Case
from lyra.conformance.shard import MOST
from lyra.spec.attention import AttentionSpec
from lyra.spec.clauses import statements
from lyra.spec.errors import InputError, SpecError
from lyra.spec.text_file import read_json

from .data import PERCENTILES, STATUSES, DistancePart, Report, backend_part, by_clause, limit

PAIR = " ↔ "

Contradiction = tuple[str, str]
"""A field, and what is wrong with it."""


def read_report(path: Path) -> Report:
    """The report in a JSON file. Raises InputError, naming the file and the field, for what is none or contradicts
    itself; OSError.
    """
    fields = read_json(path, refuse=InputError, what="a report that `lyra conform --json` wrote")
    try:
        report = Report.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise InputError(f"{str(path)!r} is no report of this version of Lyra: {where}: {first['msg']}") from None
    return sound(report, repr(str(path)))


def sound(report: Report, name: str = "the report") -> Report:
    """The report, once nothing in it contradicts the rest, with all statuses counted that this version knows.

    Raises InputError, naming the field.
    """
    for field, wrong in _contradictions(report):
        raise InputError(f"{name} contradicts itself: {field}: {wrong}")
    return report.model_copy(update={"backends": _backends(report), "clauses": _clauses(report)})


def _contradictions(report: Report) -> Iterator[Contradiction]:
    """What is wrong with a report, the plainest first: later checks rely on what earlier ones have found right."""
    for check in (_numbers, _shards, _names, _properties, _failures, _distances, _sums):
        yield from check(report)


def _numbers(report: Report) -> Iterator[Contradiction]:
    for field in ("planned", "finished", "cases", "calls", "seed", "seconds", "property_seconds", "cases_per_second"):
        if getattr(report, field) < 0:
            yield field, f"{getattr(report, field)} is less than 0"
    if report.calls < report.cases:
        yield "calls", f"{report.calls} calls are fewer than the {report.cases} cases that they make up"
    if report.finished > report.planned:
        yield "finished", f"{report.finished} properties of {report.planned} planned"
    if not report.tolerance > 0:
        yield "tolerance", f"{report.tolerance} is no limit"
    edges = report.histogram_edges
    if not edges or edges[0] <= 0 or any(edge >= other for edge, other in pairwise(edges)):
        yield "histogram_edges", "they do not ascend from above 0"
    try:
        datetime.fromisoformat(report.started)
    except ValueError:
        yield "started", f"{report.started!r:.40} is no time"
    for name in ("platform", "processor"):
        if name not in report.machine:
            yield "machine", f"it lacks {name!r}"
    try:
        if report.spec is not None:
            AttentionSpec.from_dict(report.spec)
    except SpecError as error:
        yield "spec", "; ".join(str(error).splitlines())


def _shards(report: Report) -> Iterator[Contradiction]:
    shards = report.shards
    if shards is None:
        return
    if not 1 <= shards.count <= MOST:
        yield "shards.count", f"{shards.count}; a suite is cut into 1 to {MOST}"
    elif not shards.present or shards.present != sorted(set(shards.present)):
        yield "shards.present", f"{_few(shards.present)} are not one shard or several different ones in order"
    elif not (shards.present[0] >= 1 and shards.present[-1] <= shards.count):
        yield "shards.present", f"{_few(shards.present)} of {shards.count}"
    elif not shards.merged and len(shards.present) > 1:
        yield "shards.present", f"{_few(shards.present)}, though nothing was merged"


def _names(report: Report) -> Iterator[Contradiction]:
    """Everything that goes by a name goes by it once."""
    if not report.backends:
        yield "backends", "there is none"
    for field, names in (
        ("backends", [backend.name for backend in report.backends]),
        ("properties", [prop.name for prop in report.properties]),
        ("failures", [f"{failure.property} on {failure.backend}" for failure in report.failures]),
        ("distances", [f"{part.backend}, {part.compared}" for part in report.distances]),
    ):
        for name, count in Counter(names).items():
            if count > 1:
                yield field, f"{name!r:.100} stands there {count} times"


def _properties(report: Report) -> Iterator[Contradiction]:
    names = {backend.name for backend in report.backends}
    if not report.finished <= len(report.properties) <= report.planned:
        yield "properties", f"{len(report.properties)}, where {report.finished} of {report.planned} were finished"
    for prop in report.properties:
        field = f"properties.{prop.name}"
        yield from _cited(field, prop.statements)
        for backend, tally in prop.backends.items():
            if backend not in names:
                yield field, f"backend {backend!r:.100} is none of the report's"
            if tally.cases < 0 or (tally.status in ("passed", "vacuous") and not tally.cases):
                yield field, f"{tally.status} with {tally.cases} cases on {backend!r:.100}"


def _failures(report: Report) -> Iterator[Contradiction]:
    tallies = {
        (prop.name, backend): tally.status for prop in report.properties for backend, tally in prop.backends.items()
    }
    told = set()
    for failure in report.failures:
        field = f"failures.{failure.property}"
        told.add((failure.property, failure.backend))
        status = tallies.get((failure.property, failure.backend))
        if status not in ("failed", "errored"):
            yield field, f"the property is {status or 'not there'} on {failure.backend!r:.100}"
        yield from _cited(field, failure.statements)
        if isinstance(failure.case, dict):
            try:
                Case.from_json(json.dumps(failure.case)).describe()
            except (ValueError, TypeError, AttributeError) as error:
                yield f"{field}.case", f"no case of this version: {'; '.join(str(error).splitlines())}"
    for (name, backend), status in tallies.items():
        if status in ("failed", "errored") and (name, backend) not in told:
            yield f"properties.{name}", f"{status} on {backend!r:.100}, and no failure tells why"


def _cited(field: str, cited: list[str]) -> Iterator[Contradiction]:
    unknown = [statement for statement in cited if statement not in statements()]
    if unknown or not cited:
        yield f"{field}.statements", f"{_few(unknown)} are no statements of this SPEC.md" if unknown else "none"


def _distances(report: Report) -> Iterator[Contradiction]:
    names = {backend.name for backend in report.backends}
    for part in report.distances:
        field = f"distances.{part.backend}, {part.compared}"
        if not set(part.backend.split(PAIR)) <= names:
            yield field, f"backend {part.backend!r:.100} is none of the report's"
        if part.limit != limit(part.backend, part.compared):
            yield f"{field}.limit", f"{part.limit}; expected {limit(part.backend, part.compared)}"
        yield from _distribution(field, part, len(report.histogram_edges) + 1)


def _distribution(field: str, part: DistancePart, bins: int) -> Iterator[Contradiction]:
    if len(part.histogram) != bins or min(part.histogram) < 0 or sum(part.histogram) != part.count:
        yield f"{field}.histogram", f"it does not hold {part.count} comparisons in {bins} bins"
    if not all(_is_distance(text) and count > 0 for text, count in part.values.items()):
        yield f"{field}.values", "they are not counts of numbers"
    elif part.not_finite < 0 or sum(part.values.values()) + part.not_finite != part.count:
        yield f"{field}.values", f"they and {part.not_finite} that are not finite are not {part.count} comparisons"
    if set(part.percentiles) != ({str(percentile) for percentile in PERCENTILES} if part.values else set()):
        yield f"{field}.percentiles", f"{_few(part.percentiles)}; expected {_few(map(str, PERCENTILES))}, if any value"


def _is_distance(text: str) -> bool:
    try:
        return math.isfinite(float(text)) and float(text) >= 0
    except ValueError:
        return False


def _sums(report: Report) -> Iterator[Contradiction]:
    """What the head of a report says is what its properties add up to."""
    shards = report.shards
    missing = shards is not None and shards.merged and len(shards.present) < shards.count
    if report.complete != (report.finished == report.planned and not missing):
        yield "complete", f"{report.complete}, where {report.finished} of {report.planned} properties ran"
    for said, found in zip(report.backends, _backends(report), strict=True):
        if {status: said.counts.get(status, 0) for status in STATUSES} != found.counts:
            yield f"backends.{said.name}.counts", f"the properties give {found.counts}"
        if said.verdict != found.verdict:
            yield f"backends.{said.name}.verdict", f"{said.verdict!r}, where the properties say {found.verdict!r}"
    for clause, other in zip(report.clauses, (clauses := _clauses(report)), strict=False):
        if clause.model_copy(update={"counts": other.counts}) != other:
            yield f"clauses.{clause.name}", "the properties that cite it say otherwise"
    if len(report.clauses) != len(clauses):
        yield "clauses", f"{len(report.clauses)}, where the properties cite {len(clauses)}"
    if report.ok != passes(report):
        yield "ok", f"{report.ok}, where the rest of the report says {passes(report)}"


def passes(report: Report) -> bool:
    """Whether nothing failed, nothing was cut short, and every backend had something compared, unless this is a shard,
    which may hold nothing that a backend has the capabilities for.
    """
    judged = {name for prop in report.properties for name in prop.backends}
    part = report.shards is not None and not report.shards.merged
    compared = {
        name for prop in report.properties for name, backend in prop.backends.items() if backend.status == "passed"
    }
    names = {backend.name for backend in report.backends}
    return not report.failures and report.complete and bool(judged) and (part or names <= compared)


def _backends(report: Report) -> list[Any]:
    whole = report.shards is None or report.shards.merged
    return [
        backend_part(
            backend.name,
            backend.hardware,
            backend.capabilities,
            report.properties,
            complete=report.complete,
            whole=whole,
        )
        for backend in report.backends
    ]


def _clauses(report: Report) -> list[Any]:
    return by_clause(report.properties, [backend.name for backend in report.backends])


def _few(items: Iterable[object]) -> str:
    shown = [f"{item!r:.40}" if isinstance(item, str) else str(item) for item in items]
    return ", ".join(shown[:6]) + (" …" if len(shown) > 6 else "")
