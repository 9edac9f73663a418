"""What a run saw, carried from worker processes to the one that reports it."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache

from pydantic import TypeAdapter

from .record import Record, rate
from .session import Session


def serialize_record(session: Session) -> str:
    """What a run saw in this process since this was last called, as JSON; its record starts anew."""
    seen = session.record
    session.record = Record(planned=seen.planned, shard=seen.shard)
    failures = [asdict(failure) for failure in seen.failures.values()]
    distances = [(*key, ratios) for key, ratios in seen.distances.items()]
    return json.dumps(asdict(seen) | {"failures": failures, "distances": distances})


def read_record(seen: str) -> Record:
    """What another process has handed over."""
    fields = json.loads(seen)
    fields["failures"] = {(failure["property"], failure["backend"]): failure for failure in fields["failures"]}
    fields["distances"] = {(backend, compared): ratios for backend, compared, ratios in fields["distances"]}
    return _records().validate_python(fields)


@cache
def _records() -> TypeAdapter[Record]:
    """What makes records of plain data: made once, which takes a good part of a property's time."""
    return TypeAdapter(Record)


def merge_record(session: Session, seen: str) -> None:
    """Add what another process of a run saw to the record of this one."""
    session.record.add(read_record(seen))


def closing_lines(record: Record) -> list[str]:
    """Cases, rate and, of a part of the suite, which part it was."""
    if not record.cases:
        return []
    cases, calls = rate(record.cases, record.seconds), rate(record.calls, record.seconds)
    lines = [
        f"lyra: {record.cases} compared cases, {record.calls} calls: {cases:.0f} cases, {calls:.0f} calls a second"
    ]
    if record.shard is not None:
        lines.append(f"lyra: shard {record.shard} of the suite; the others are needed for a verdict")
    return lines
