"""`lyra faults`: does the suite notice mistakes that are put into a backend on purpose?"""

from __future__ import annotations

import json
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lyra.backends.protocol import import_extra
from lyra.progress import steps
from lyra.spec.errors import InputError
from lyra.spec.files import write_atomically
from lyra.terminal import console, new_table, visible

from .conform import ProfileName
from .files import check_files

if TYPE_CHECKING:
    from lyra.conformance.faults.catalogue import Fault
    from lyra.conformance.faults.generators import Tamed
    from lyra.conformance.faults.kill import Verdict


class FaultyBackend(StrEnum):
    """The backends that the catalogue has faults for, and the subjects that show those in the wiring of modules."""

    torch = "torch"
    jax = "jax"
    torch_module = "torch-module"
    jax_module = "jax-module"


COLOURS = {"killed": "green", "survived": "bold red", "broken": "bold yellow"}


def faults(
    backend: Annotated[
        list[FaultyBackend] | None,
        typer.Option(help="Backend or subject to put faults into; may be repeated (default: all)."),
    ] = None,
    profile: Annotated[ProfileName, typer.Option(help="How much the suite generates.")] = ProfileName.smoke,
    only: Annotated[
        list[str] | None, typer.Option(help="A fault, a clause or a statement; may be repeated (default: all).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the generated cases.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that try faults side by side (default: one a core).")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the verdicts as JSON.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print the catalogue and stop.")] = False,
) -> None:
    """Put each catalogued fault into each backend and run the suite: killed or survived.

    Without --only, the suite's own generators too: made tame, so that what a property is about never comes up, they
    must leave it vacuous. Exit code 0: the suite killed and noticed all of them; 1: a fault survived, or tame cases
    went unnoticed; 2: usage, or a fault that cannot be made.
    """
    check_files(json_path)
    import_extra("hypothesis", "conformance")
    import_extra("pytest", "conformance")
    from lyra.conformance.faults.catalogue import select
    from lyra.conformance.faults.generators import tame_everywhere
    from lyra.conformance.faults.workers import kill_all
    from lyra.conformance.launch import prepare_environment

    prepare_environment()
    printer = console()
    chosen = select(only or [])
    if list_only:
        printer.print(_list(chosen))
        return
    names = [name.value for name in backend or FaultyBackend]
    work = [(fault, name) for name in names for fault in chosen if name in fault.backends]
    if chosen and not work:
        raise InputError(f"none of these faults can be made in {', '.join(names)}: it lacks what they need")
    settled: dict[int, Verdict] = {}
    started = time.perf_counter()
    with steps(f"Faults, profile {profile.value}") as move:
        move("", 0, len(work))
        for place, verdict in kill_all(
            work, profile.value, seed, workers or max(1, min(os.cpu_count() or 1, len(work)))
        ):
            settled[place] = verdict
            move(f"{verdict.backend}: {verdict.fault} {verdict.status}", len(settled), len(work))
    verdicts = [settled[place] for place in sorted(settled)]
    _report(printer, chosen, verdicts, names)
    printer.print(f"{len(work)} faults in {time.perf_counter() - started:.0f} s, profile {profile.value}")
    tame = [] if only else tame_everywhere(names, profile.value, seed)
    _report_tame(printer, tame)
    if json_path is not None:
        data = {
            "format": 1,
            "profile": profile.value,
            "seed": seed,
            "faults": [verdict.to_dict() for verdict in verdicts],
            "generators": [tamed.to_dict() for tamed in tame],
        }
        write_atomically(json_path, json.dumps(data, indent=2, ensure_ascii=False).encode())
    if any(verdict.status == "broken" for verdict in verdicts):
        raise typer.Exit(2)
    unnoticed = any(tamed.status != "vacuous" for tamed in tame)
    raise typer.Exit(1 if unnoticed or any(verdict.status == "survived" for verdict in verdicts) else 0)


def _list(chosen: list[Fault]) -> Table:
    table = new_table("Catalogue of faults")
    for name in ("fault", "breaks", "what goes wrong"):
        table.add_column(name, overflow="fold")
    clause = ""
    for fault in chosen:
        if clause and fault.clause != clause:
            table.add_section()
        clause = fault.clause
        table.add_row(fault.id, ", ".join(fault.breaks), fault.does)
    return table


def _report(printer: Console, chosen: list[Fault], verdicts: list[Verdict], names: list[str]) -> None:
    """The kill tables, clause by clause, then what survived, then one line per backend."""
    modules = [name for name in names if name.endswith("-module")]
    for title, some in (
        ("Faults by clause", [name for name in names if name not in modules]),
        ("Faults in the wiring of modules", modules),
    ):
        if listed := [fault for fault in chosen if set(some) & set(fault.backends)]:
            printer.print(_table(title, listed, verdicts, some))
    does = {fault.id: fault.does for fault in chosen}
    for verdict in verdicts:
        if verdict.status != "killed":
            said = f" {verdict.backend}: {verdict.fault}: {does[verdict.fault]}"
            printer.print(Text.assemble((verdict.status, COLOURS[verdict.status]), said))
            if verdict.message:
                printer.print(f"  {verdict.message}")
    for name in names:
        mine = [verdict for verdict in verdicts if verdict.backend == name]
        killed = sum(verdict.status == "killed" for verdict in mine)
        if mine:
            seconds = sum(verdict.seconds for verdict in mine)
            printer.print(f"{name}: {killed} of {len(mine)} killed in {seconds:.0f} s")


def _table(title: str, faults: list[Fault], verdicts: list[Verdict], names: list[str]) -> Table:
    """What became of faults, in a column for each backend."""
    settled = {(verdict.fault, verdict.backend): verdict for verdict in verdicts}
    table = new_table(title)
    table.add_column("fault", overflow="fold")
    for name in names:
        table.add_column(name, overflow="fold")
    clause = ""
    for fault in faults:
        if fault.clause != clause:
            table.add_section()
            table.add_row(Text(fault.clause, style="bold"))
            clause = fault.clause
        table.add_row(fault.id, *(_cell(settled.get((fault.id, name))) for name in names))
    return table


def _report_tame(printer: Console, tame: list[Tamed]) -> None:
    """How many premises were missed where tame generators never met them, and which were not."""
    for tamed in tame:
        if tamed.status != "vacuous":
            said = f" {tamed.property}, without any case of: {tamed.premise}"
            printer.print(Text.assemble((tamed.status, COLOURS["survived"]), said))
    if tame:
        noticed = sum(tamed.status == "vacuous" for tamed in tame)
        printer.print(f"generators made tame: {noticed} of {len(tame)} properties and premises vacuous")


def _cell(verdict: Verdict | None) -> Text:
    """`killed by static::one_softmax (STATIC-1) at heads, 3 cases, 0.8 s`; nothing where a backend can't have it."""
    if verdict is None:
        return Text("cannot have it", style="dim")
    text = f" by {verdict.property} ({verdict.statement})" if verdict.property else ""
    text += f" at {verdict.stage}" if verdict.stage else ""
    told = visible(f"{text}, {verdict.cases} cases, {verdict.seconds:.1f} s")
    return Text.assemble((verdict.status, COLOURS[verdict.status]), told)
