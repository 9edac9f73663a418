"""`lyra conform`: the main job."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lyra.backends.protocol import import_extra
from lyra.progress import steps
from lyra.spec.errors import InputError
from lyra.spec.files import write_atomically
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
    examples: Annotated[
        int | None, typer.Option(min=1, help="Examples for a property of weight 1, in place of the profile's.")
    ] = None,
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
    isolate: Annotated[
        bool, typer.Option("--isolate/--no-isolate", help="Go on in another process where a backend ends one.")
    ] = True,
    case_limit: Annotated[
        float, typer.Option(metavar="SECONDS", min=1.0, help="Time that a backend has for a case, compiling included.")
    ] = 300.0,
    list_only: Annotated[bool, typer.Option("--list", help="Print statement → properties → faults and stop.")] = False,
) -> None:
    """Hold backends to the spec: against Hugging Face, the float64 oracle and each other.

    Backends run in a process of their own: whatever one does to it ends no run. Exit code 0: something was compared,
    and all of it passed; 1: something failed or errored, or the run was cut short; 2: usage.
    """
    import_extra("hypothesis", "conformance")
    import_extra("pytest", "conformance")
    if list_only:
        check_files(json_path=json_path)
        _list(json_path)
        return
    from lyra.conformance.launch import settled
    from lyra.conformance.replay import Replay
    from lyra.conformance.report.data import report_data
    from lyra.conformance.report.junit import junit as junit_xml
    from lyra.conformance.report.table import print_report
    from lyra.conformance.report.verdict import exit_code
    from lyra.conformance.report.write import write_report
    from lyra.conformance.selection import selects
    from lyra.conformance.session import PROFILES
    from lyra.conformance.supervisor import Supervisor

    check_files(json_path, junit, report, inputs=(replay, spec), folders=(database,))
    if only is not None:
        selects(only, "", "")
    if replay is not None:
        Replay.read(str(replay))
    plan = PROFILES[profile.value] if examples is None else replace(PROFILES[profile.value], examples=examples)
    session = settled(profile=plan, seed=seed, spec=spec, shard=shard, database=database)
    session.isolated, session.case_limit = isolate, case_limit
    task = {
        "names": list(dict.fromkeys(backend or [])),
        "profile": asdict(session.profile),
        "seed": seed,
        "spec": spec,
        "shard": shard,
        "database": str(database) if database is not None else None,
        "fail_fast": fail_fast,
        "replay": str(replay) if replay is not None else None,
        "only": only,
    }
    started = time.perf_counter()
    with steps(f"{' and '.join(backend or ['all backends'])}, profile {profile.value}") as move:

        def tell(name: str, done: int, total: int) -> None:
            move(name.rpartition("::")[2], done, total)

        course = Supervisor(session, task, tell).run()
    seconds = time.perf_counter() - started
    printer = console()
    if course.log:
        printer.print(course.log, highlight=False)
    found = None
    if course.planned:
        found = report_data(session, seconds)
        print_report(printer, found)
        write_report(found, json_path, report)
        if junit is not None:
            write_atomically(junit, junit_xml(found, course.seconds))
    elif not course.log:
        selection = f"--replay {replay}" if replay else f"profile {profile.value} with --only {only!r}"
        raise InputError(f"{selection} names no property; `lyra conform --list` names them all")
    raise typer.Exit(exit_code(found))


def _list(json_path: Path | None) -> None:
    from lyra.conformance.launch import prepare_environment

    prepare_environment()
    from lyra.conformance.report.traceability import listing, listing_table

    found = listing()
    show(found.model_dump(), json_path, listing_table(found))
