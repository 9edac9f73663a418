"""What a run saw, carried from worker processes to the one that reports it, and reported at the end."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from .record import Record, rate
from .session import current


def serialize_record() -> str:
    """What this worker saw since it last handed over, as JSON; its record starts anew."""
    session = current()
    seen = session.record
    session.record = Record(planned=seen.planned, shard=seen.shard)
    failures = [asdict(failure) for failure in seen.failures.values()]
    distances = [(*key, ratios) for key, ratios in seen.distances.items()]
    return json.dumps(asdict(seen) | {"failures": failures, "distances": distances})


def read_record(seen: str) -> Record:
    """What another process has handed over."""
    fields = json.loads(seen)
    fields["failures"] = {(one["property"], one["backend"]): one for one in fields["failures"]}
    fields["distances"] = {(backend, compared): ratios for backend, compared, ratios in fields["distances"]}
    return _records().validate_python(fields)


@cache
def _records() -> TypeAdapter[Record]:
    """What makes records of plain data: made once, which takes a good part of a property's time."""
    return TypeAdapter(Record)


def merge_record(seen: str) -> None:
    """Add what a worker of this run saw to the record of this process."""
    current().record.add(read_record(seen))


def finish(json_path: Path | None, page: Path | None, *, seconds: float) -> int:
    """Write the report of the current session as JSON and as a page, where a path is given; the exit code it means."""
    from .report.data import report_data
    from .report.verdict import exit_code
    from .report.write import write_report

    report = report_data(current(), seconds)
    if json_path is not None or page is not None:
        write_report(report, json_path, page)
    return exit_code(report)


def closing_lines() -> list[str]:
    """Cases, rate and, of a part of the suite, which part it was."""
    record = current().record
    if not record.cases:
        return []
    cases, calls = rate(record.cases, record.seconds), rate(record.calls, record.seconds)
    lines = [
        f"lyra: {record.cases} compared cases, {record.calls} calls: {cases:.0f} cases, {calls:.0f} calls a second"
    ]
    if record.shard is not None:
        lines.append(f"lyra: shard {record.shard} of the suite; the others are needed for a verdict")
    return lines
