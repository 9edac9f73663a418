"""`lyra conform`: the main job."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lyra.backends.protocol import import_extra
from lyra.spec.errors import InputError
from lyra.terminal import console

from .files import check_files
from .output import show


class ProfileName(StrEnum):
    """How much the suite generates."""

    smoke = "smoke"
    ci = "ci"
    thorough = "thorough"


def conform(
    backend: Annotated[
        list[str] | None, typer.Option(help="Backend under test, by name or package.module:Class; may be repeated.")
    ] = None,
    profile: Annotated[ProfileName, typer.Option(help="How much to generate.")] = ProfileName.smoke,
    spec: Annotated[str | None, typer.Option(help="Hold the suite to one spec: a preset or a TOML file.")] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the generated cases.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the report as JUnit XML.")] = None,
    replay: Annotated[Path | None, typer.Option(help="Run one recorded case only.")] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="Properties by name: words joined by and, or, not.")
    ] = None,
    report: Annotated[Path | None, typer.Option(metavar="PATH.html", help="Write the report as one HTML page.")] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Run one of N parts of the suite; `lyra merge` joins the reports.")
    ] = None,
    database: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep failing examples here, and try them first next time.")
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print statement → properties → faults and stop.")] = False,
) -> None:
    """Hold backends to the spec: against Hugging Face, the float64 oracle and each other.

    Exit code 0: all passed; 1: something failed or errored, or the run was cut short; 2: usage.
    """
    import_extra("hypothesis", "conformance")
    import_extra("pytest", "conformance")
    if list_only:
        check_files(json_path=json_path)
        _list(json_path)
        return
    from lyra.conformance.launch import make_session
    from lyra.conformance.replay import Replay
    from lyra.conformance.report.data import report_data
    from lyra.conformance.report.table import print_report
    from lyra.conformance.report.write import write_report
    from lyra.conformance.runner import run

    check_files(json_path, junit, report, inputs=(replay, spec), folders=(database,))
    printer = console()
    if replay is not None:
        Replay.read(str(replay))
    session = make_session(backend or [], profile=profile.value, seed=seed, spec=spec, shard=shard, database=database)
    names = [one.name for one in session.backends]
    started = time.perf_counter()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"{' and '.join(names)}, profile {profile.value}", total=None)
        outcome = run(
            session,
            fail_fast=fail_fast,
            replay=str(replay) if replay else None,
            junit=str(junit) if junit else None,
            only=only,
            progress=lambda name, done, total: bar.update(task, completed=done, total=total, description=name or None),
        )
    seconds = time.perf_counter() - started
    if outcome.found_nothing:
        asked = f"--replay {replay}" if replay else f"profile {profile.value} with --only {only!r}"
        raise InputError(f"{asked} names no property; `lyra conform --list` names them all")
    if outcome.refused:
        raise InputError(outcome.refused)
    if outcome.broke:
        printer.print(outcome.log, highlight=False)
        raise typer.Exit(2)
    found = report_data(session, seconds)
    print_report(printer, found)
    write_report(found, json_path, report)
    raise typer.Exit(0 if session.record.ok and outcome.exit_code == 0 else 1)


def _list(json_path: Path | None) -> None:
    from lyra.conformance.launch import prepare_environment

    prepare_environment()
    from lyra.conformance.report.traceability import listing, listing_table

    found = listing()
    show(found.model_dump(), json_path, listing_table(found))
