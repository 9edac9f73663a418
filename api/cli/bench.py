"""lyra bench: how fast everything is, side by side in one run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from lyra.progress import steps
from lyra.spec.errors import InputError
from lyra.spec.files import write_atomically
from lyra.speed.measure import as_data, from_data, probe, run
from lyra.speed.row import Row
from lyra.speed.rows import all_rows, chosen_rows
from lyra.speed.show import table
from lyra.speed.workers import WorkerError, Workers

from .files import check_files
from .options import MOST_THREADS, JsonPath, finite
from .output import show

NEEDED = {"torch": "torch", "transformers": "torch", "jax": "jax", "flax": "jax"}
"""What the contestants import, and the extras that bring it."""


def bench(
    only: Annotated[
        list[str] | None, typer.Option(help="Rows whose names begin with this; may be given again.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few rows, five rounds each: the report of CI.")] = False,
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
    if listed:
        _refuse_idle("--list only names rows", beside)
        typer.echo("\n".join(f"{row.name}: {row.what}" for row in rows))
        return
    if measured:
        _refuse_idle("--from shows what was measured", {"--only": only, "--quick": quick, "--threads": threads})
    pictures = None if page is None else page.parent / "images"
    check_files(page, json_path=json_path, inputs=measured or (), folders=(pictures,))
    cores = threads or os.cpu_count() or 1
    data = joined(measured) if measured else measure_rows(rows, quick, cores, json_path)
    results = [from_data(one) for one in data["results"]]
    if page is not None:
        from lyra.speed.page import write_page

        write_page(page, data["machine"], results)
    show(data, json_path, table(results, data["machine"]))
    if data.get("failed"):
        raise typer.Exit(1)
    if margin is not None:
        beyond = [one.what for result in results for one in result.findings if not one.within(margin)]
        if beyond:
            typer.echo(f"more than {margin:g} times off the target: {'; '.join(beyond)}", err=True)
            raise typer.Exit(1)


def _refuse_idle(why: str, options: Mapping[str, object]) -> None:
    idle = [name for name, value in options.items() if value not in (None, False)]
    if idle:
        raise InputError(f"{' and '.join(idle)} would have no effect: {why}; leave {'them' if idle[1:] else 'it'} out")


def measure_rows(rows: list[Row], quick: bool, threads: int, json_path: Path | None) -> dict[str, Any]:
    """The rows' results, as plain data, and the machine that they were measured on.

    They are written to `json_path` after every row, so that an interrupt loses one. A row that fails is named on
    standard error and under "failed", and the others go on. Raises ImportError.
    """
    for name, extra in NEEDED.items():
        if find_spec(name) is None:
            raise ImportError(f"the benchmark needs {name!r}, which is not installed: pip install 'lyra[{extra}]'")
    with Workers(threads) as workers, steps("Measuring") as move:
        machine = workers.ask("torch", "call", make="lyra.speed.machine:describe", options={})
        data: dict[str, Any] = {
            "machine": {**machine, "threads": threads, "rates": probe(workers)},
            "results": [],
            "failed": [],
        }
        for number, row in enumerate(rows):
            move(row.name, number, len(rows))
            try:
                data["results"].append(as_data(run(row, workers, quick)))
            except WorkerError as error:
                typer.echo(f"{row.name} failed: {error}", err=True)
                data["failed"].append(row.name)
            if json_path not in {None, Path("-")}:
                write_atomically(json_path, json.dumps(data, indent=2).encode())
    return data


def joined(paths: list[Path]) -> dict[str, Any]:
    """The results of several runs, in the order of the rows, with the notes that these have now.

    Of a row that is in several runs the last counts. Raises InputError.
    """
    runs = [read(path) for path in paths]
    found = {one["name"]: one for data in runs for one in data["results"]}
    return {**runs[0], "results": [found[row.name] | {"note": row.note} for row in all_rows() if row.name in found]}


def read(path: Path) -> dict[str, Any]:
    """Results that an earlier run wrote. Raises InputError for a file that holds something else."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or {"machine", "results"} - set(data):
        raise InputError(f"{path} holds no results; give a file that lyra bench --json wrote")
    return data
