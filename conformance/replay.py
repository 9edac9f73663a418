"""Replay files: one failing case, its property and what was seen, enough to see it again anywhere."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lyra.spec.files import write_atomically

from .case import Case
from .record import Failure
from .session import UsageError, current

FOLDER = Path(".lyra") / "cases"
"""Where failing cases are written, below the working folder."""


@dataclass(frozen=True)
class Replay:
    """What `--replay` runs: a property by name and, if it takes one, a case."""

    property: str
    case: Case | None

    @classmethod
    def read(cls, path: str) -> Replay:
        """Read a replay file. Raises UsageError with the reason where it is none."""
        try:
            fields = json.loads(Path(path).read_text())
            name, case = fields["property"], fields["case"]
        except OSError as error:
            raise UsageError(f"cannot read the case {path!r}: {error.strerror}") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UsageError(f"{path!r} is no case file: {error}") from None
        try:
            return cls(name, Case.from_json(json.dumps(case)) if isinstance(case, dict) else None)
        except ValueError as error:
            raise UsageError(f"{path!r} holds no case of this version: {error}") from None


def write_replay(failure: Failure) -> Path:
    """Write a failure's case file and give its path."""
    name = re.sub(r"[^A-Za-z0-9_]+", "-", f"{failure.property}-{failure.backend}").strip("-")
    path = FOLDER / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fields: dict[str, Any] = {
        "property": failure.property,
        "backend": failure.backend,
        "statements": failure.statements,
        "stage": failure.stage,
        "message": failure.message,
        "case": _case(failure.case),
    }
    write_atomically(path, json.dumps(fields, indent=2, ensure_ascii=False).encode())
    return path


def _case(text: str | None) -> Any:
    if text is None:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def command(failure: Failure) -> str:
    """The command that runs a failure's case again."""
    backend = current().asked.get(failure.backend, failure.backend)
    return f"lyra conform --backend {backend} --replay {failure.replay}"


def describe(failure: Failure, again: str | None = None) -> str:
    """The failure as a person reads it: clause, backend, values, stage, case and the command that replays it.

    `again` is that command, where the run that failed is not the current one.
    """
    stage = failure.stage or "unknown (no stage is off by itself, or the backend gives no trace)"
    case = _case(failure.case)
    picture = Case.from_json(json.dumps(case)).describe() if isinstance(case, dict) else case or "none was compared"
    raised = "  the backend raised" if failure.case is not None else "  the property raised, not the backend"
    lines = [
        f"{', '.join(failure.statements)} {failure.kind} on backend {failure.backend!r} in {failure.property}",
        f"  {failure.message}",
        f"  first diverging stage: {stage}" if failure.kind == "failed" else raised,
        f"  case: {picture}",
    ]
    if failure.replay:
        lines.append(f"  replay: {again or command(failure)}")
    return "\n".join(lines)
