"""Replay files: one failing case, its property and what was seen, enough to see it again anywhere."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lyra.backends.raised import raised
from lyra.spec.files import write_atomically
from lyra.spec.text_file import read_json

from .case import Case
from .record import BY_ITSELF, Failure
from .session import UsageError

FOLDER = Path(".lyra") / "cases"
"""Where failing cases are written, below the working folder."""

RENAMED = {"gates::gates_of_one_and_zero_are_a_split": "blends::blends_of_one_and_zero_are_a_split"}
"""Properties that had another name when a case file was written."""

LARGEST, MOST_NUMBERS = 2**32, 2**29
"""Counts in a case file are below the one, and its arrays hold no more numbers than the other: 2 GiB."""


@dataclass(frozen=True)
class Replay:
    """What `--replay` runs: a property by name and, if it takes one, a case."""

    property: str
    case: Case | None

    @classmethod
    def read(cls, path: str) -> Replay:
        """Read a replay file. Raises UsageError with the reason where it is none."""
        try:
            fields = read_json(path, refuse=UsageError, what="a case that `lyra conform` wrote")
        except OSError as error:
            raise UsageError(f"cannot read the case {path!r}: {error.strerror}") from None
        name, case = fields.get("property"), fields.get("case")
        if not isinstance(name, str) or "case" not in fields:
            raise UsageError(f"{path!r} is no case: it lacks 'property', a text, or 'case'")
        name = RENAMED.get(name, name)
        if not isinstance(case, dict):
            return cls(name, None)
        try:
            return cls(name, possible(Case.from_json(json.dumps(case))))
        except ValueError as error:
            raise UsageError(f"{path!r} holds no case of this version: {'; '.join(str(error).splitlines())}") from None


def possible(case: Case) -> Case:
    """A case that a file made, once its arrays can be made of it. Raises ValueError, before anything is allocated."""
    context = case.context
    counts = [*case.calls, *case.padding, case.batch, case.start, case.seed]
    counts += [context.tokens, context.batch, context.start, *context.hidden] if context is not None else []
    odd = [
        count for count in counts if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < LARGEST
    ]
    if odd or not case.calls:
        raise ValueError(f"a count, a position or a seed is {odd[0]!r:.60}" if odd else "it has no calls")
    spec, slots = case.spec, context.tokens * context.batch if context is not None else 0
    heads = (spec.num_attention_heads + 2 * spec.num_key_value_heads) * spec.head_dim
    size = (spec.hidden_size + case.batch * case.tokens + slots) * (heads + spec.hidden_size)
    if size > MOST_NUMBERS:
        raise ValueError(f"its arrays have {size:.1e} numbers, of at most {MOST_NUMBERS:.1e}")
    try:
        case.problem()
        case.describe()
    except Exception as error:  # whatever its values, which nothing has checked, make of themselves
        raise ValueError(f"it gives no arrays ({raised(error)})") from None
    return case


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


def command(failure: Failure, requested_as: Mapping[str, str]) -> str:
    """The command that runs a failure's case again; `requested_as` is how backends with another name were asked for."""
    backend = requested_as.get(failure.backend, failure.backend)
    return f"lyra conform --backend {shlex.quote(backend)} --replay {shlex.quote(str(failure.replay))}"


def describe(failure: Failure, again: str | None) -> str:
    """A failure as a person reads it: clause, backend, values, stage, case; `again` is the command that replays it."""
    stage = failure.stage or "unknown (no stage is off by itself, or the backend gives no trace)"
    case = _case(failure.case)
    picture = Case.from_json(json.dumps(case)).describe() if isinstance(case, dict) else case or "none was compared"
    raised = "  the property raised, not the backend" if BY_ITSELF in failure.message else "  the backend is at fault"
    lines = [
        f"{', '.join(failure.statements)} {failure.kind} on backend {failure.backend!r} in {failure.property}",
        f"  {failure.message}",
        f"  first diverging stage: {stage}" if failure.kind == "failed" else raised,
        f"  case: {picture}",
    ]
    if failure.replay:
        lines.append(f"  replay: {again}")
    return "\n".join(lines)
