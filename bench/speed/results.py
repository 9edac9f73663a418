"""What rows gave, and how it is kept: as plain data, in a file of `lyra bench --json`, read again and joined."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lyra.spec.errors import InputError

from .row import Finding
from .rows import all_rows


@dataclass(frozen=True)
class Result:
    """What a row gave. times: median seconds by contestant; profile: shares of the subject's time by operation."""

    name: str
    what: str
    kind: str
    findings: list[Finding] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    rounds: int = 0
    floor: dict[str, float] | None = None
    profile: list[tuple[str, float]] | None = None
    table: list[list[str]] | None = None
    series: dict[str, list[tuple[int, float]]] | None = None
    option: str = ""
    note: str = ""
    out_of_reach: str = ""
    """What of the row would have taken this machine too long."""

    @property
    def met(self) -> bool:
        """Whether every finding keeps its bound."""
        return all(finding.met is not False for finding in self.findings)

    def as_data(self) -> dict[str, Any]:
        """Plain data; each finding says whether it is met."""
        return asdict(self) | {"findings": [asdict(finding) | {"met": finding.met} for finding in self.findings]}


class Rates(TypedDict):
    """What a machine does in a second."""

    bandwidth: float
    float32: float
    bfloat16: float


class Machine(TypedDict):
    """What is shown of the machine that results were measured on."""

    processor: str
    threads: int
    versions: dict[str, str]
    rates: Rates


class Results(TypedDict):
    """What a file of --json holds, as far as it is read again."""

    machine: Machine
    results: list[Result]


RESULTS = TypeAdapter(Results)


def results_of(data: dict[str, Any]) -> list[Result]:
    """The results in what a file of --json holds."""
    return RESULTS.validate_python(data)["results"]


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """The results of several runs, in the order of the rows, with the notes that these have now.

    Of a row that is in several runs the last counts. Raises InputError.
    """
    runs = [read(path) for path in paths]
    by_row = {result["name"]: result for data in runs for result in data["results"]}
    return {**runs[0], "results": [by_row[row.name] | {"note": row.note} for row in all_rows() if row.name in by_row]}


def read(path: Path) -> dict[str, Any]:
    """Results that an earlier run wrote. Raises InputError for a file that holds something else."""
    try:
        RESULTS.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "".join(f"{part}." for part in first["loc"]).rstrip(".")
        raise InputError(
            f"{path} holds no results ({f'{where}: ' if where else ''}{first['msg']}); give a file that lyra bench "
            "--json wrote"
        ) from None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
