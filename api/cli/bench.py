"""lyra bench: how fast everything is, side by side in one run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from lyra.progress import Steps, about, steps
from lyra.spec.errors import InputError
from lyra.spec.files import write_atomically
from lyra.speed.measure import Tell, probe, run
from lyra.speed.results import joined, results_of
from lyra.speed.row import Row
from lyra.speed.rows import chosen_rows
from lyra.speed.show import table
from lyra.speed.workers import OutOfReach, WorkerError, Workers
from lyra.terminal import paragraphs

from .files import STANDARD, check_files
from .options import MOST_THREADS, JsonPath, finite
from .output import show

ROW_LIMIT = 600.0
"""Seconds that a row may take where --row-limit says nothing else."""


NEEDED = {"torch": "torch", "transformers": "torch", "jax": "jax", "flax": "jax"}
"""What the contestants import, and the extras that bring it."""


def bench(
    only: Annotated[
        list[str] | None, typer.Option(help="Rows whose names begin with this; may be given again.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows, five rounds each: the report of CI.")] = False,
    row_limit: Annotated[
        float | None,
        typer.Option(
            min=1,
            callback=finite,
            metavar="SECONDS",
            help=f"What a row may take: rounds are left out, then it is out of reach. Else {ROW_LIMIT:g}.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads of every contestant; else one a core.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Only name the rows.")] = False,
    margin: Annotated[
        float | None,
        typer.Option(min=1, callback=finite, help="Exit with 1 where a figure is this many times off its target."),
    ] = None,
    json_path: JsonPath = None,
    page: Annotated[Path | None, typer.Option(metavar="PATH", help="Write the page, and its pictures.")] = None,
    measured: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="PATH", help="Results of an earlier --json, shown again; several are joined."),
    ] = None,
) -> None:
    """Time Lyra beside Hugging Face and others, in turns, against what this machine can read and multiply.

    Figures are ratios of paired rounds. A missed target is reported, and is no error unless --margin says how far off
    is one.
    """
    rows = chosen_rows(only, quick)
    beside = {"--json": json_path, "--page": page, "--from": measured, "--margin": margin, "--threads": threads}
    beside["--row-limit"] = row_limit
    if listed:
        _refuse_idle("--list only names rows", beside)
        typer.echo("\n".join(f"{row.name}: {row.what}" for row in rows))
        return
    if measured:
        _refuse_idle(
            "--from shows what was measured",
            {"--only": only, "--quick": quick, "--threads": threads, "--row-limit": row_limit},
        )
    pictures = None if page is None else page.parent / "images"
    check_files(page, json_path=json_path, inputs=measured or (), folders=(pictures,))
    cores = threads or os.cpu_count() or 1
    data = joined(measured) if measured else measure_rows(rows, quick, cores, json_path, row_limit or ROW_LIMIT)
    results = results_of(data)
    if page is not None:
        from lyra.speed.page import write_page

        write_page(page, data["machine"], results)
    show(data, json_path, table(results, data["machine"]))
    if data.get("failed") or not results:
        raise typer.Exit(1)
    if margin is not None:
        beyond = [finding.what for result in results for finding in result.findings if not finding.within(margin)]
        if beyond:
            typer.echo(f"more than {margin:g} times off the target: {'; '.join(beyond)}", err=True)
            raise typer.Exit(1)


def _refuse_idle(why: str, options: Mapping[str, object]) -> None:
    idle = [name for name, value in options.items() if value not in (None, False)]
    if idle:
        raise InputError(f"{' and '.join(idle)} would have no effect: {why}; leave {'them' if idle[1:] else 'it'} out")


def measure_rows(
    rows: list[Row], quick: bool, threads: int, json_path: Path | None, limit: float = ROW_LIMIT
) -> dict[str, Any]:
    """The rows' results, as plain data, and the machine that they were measured on.

    They are written to `json_path` after every row, so that an interrupt loses one. A row that fails is named on
    standard error and under "failed", one that would take more than `limit` seconds under "out_of_reach", and the
    others go on. Raises ImportError.
    """
    for name, extra in NEEDED.items():
        if find_spec(name) is None:
            raise ImportError(f"the benchmark needs {name!r}, which is not installed: pip install 'lyra[{extra}]'")
    with Workers(threads) as workers, steps("Measuring", at_once=True) as move:
        move("this machine", 0, len(rows))
        machine = workers.ask("torch", "call", "lyra.speed.machine:describe", {})
        data: dict[str, Any] = {
            "machine": {**machine, "threads": threads, "rates": probe(workers, ("float32", "bfloat16"))},
            "results": [],
            "failed": [],
            "out_of_reach": [],
        }
        for number, row in enumerate(rows):
            move(row.name, number, len(rows))
            began = time.monotonic()
            tell = partial(_tell_of, move, row.name, number, len(rows))
            ended = measure_row(row, workers, quick, limit, data, tell)
            move(f"{row.name} {ended} {about(time.monotonic() - began)}", number + 1, len(rows))
            if json_path is not None and json_path != STANDARD:
                write_atomically(json_path, json.dumps(data, indent=2).encode())
    return data


def measure_row(row: Row, workers: Workers, quick: bool, limit: float, data: dict[str, Any], tell: Tell) -> str:
    """Put what a row gives where it belongs, and say in a few words how it ended; the time follows."""
    try:
        found = run(row, workers, quick, tell, limit)
    except OutOfReach:
        typer.echo(f"{row.name} is out of reach here: it takes more than the {limit:g} s of --row-limit", err=True)
        data["out_of_reach"].append(row.name)
        return "was given up after"
    except WorkerError as error:
        typer.echo(f"{row.name} failed: {paragraphs(error)}", err=True)
        data["failed"].append(row.name)
        return "failed after"
    if found.out_of_reach:
        typer.echo(f"{row.name}: {found.out_of_reach} is out of reach here, within {limit:g} s", err=True)
    data["results"].append(found.as_data())
    return "took"


def _tell_of(move: Steps, name: str, number: int, total: int, what: str) -> None:
    move(f"{name}: {what}", number, total)
