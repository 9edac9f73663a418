"""Results of earlier runs: what a file of `lyra bench --json` holds, read again and joined."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lyra.spec.errors import InputError

from .measure import Result
from .rows import all_rows


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


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """The results of several runs, in the order of the rows, with the notes that these have now.

    Of a row that is in several runs the last counts. Raises InputError.
    """
    runs = [read(path) for path in paths]
    found = {one["name"]: one for data in runs for one in data["results"]}
    return {**runs[0], "results": [found[row.name] | {"note": row.note} for row in all_rows() if row.name in found]}


def read(path: Path) -> dict[str, Any]:
    """Results that an earlier run wrote. Raises InputError for a file that holds something else."""
    try:
        RESULTS.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path} holds no results ({f'{where}: ' if where else ''}{first['msg']}); give a file that lyra bench "
            "--json wrote"
        ) from None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
