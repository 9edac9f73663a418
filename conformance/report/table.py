"""The report in a terminal: clause × backend, then every failure with what a person needs."""

from __future__ import annotations

import json

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lyra.conformance.record import Failure, Status
from lyra.conformance.replay import describe
from lyra.terminal import paragraphs, visible

from .data import STATUSES, FailurePart, Report, alike, how_much, part_of, shortfall, vacuous

STYLE: dict[Status, str] = {
    "passed": "green",
    "failed": "bold red",
    "errored": "bold magenta",
    "vacuous": "bold yellow",
    "unsupported": "yellow",
}


def conformance_table(report: Report, width: int = 100) -> Table:
    """Clause × backend, in the order of SPEC.md: the gravest status of the properties that cite it, and their cases.

    `width` is the screen's; the titles are cut so that the figures keep their lines.
    """
    table = Table(title="Conformance by clause", title_justify="left")
    rows, backends = report.clauses, [backend.name for backend in report.backends]
    columns = {name: [_cell(row.status[name], row.cases[name]) for row in rows] for name in backends}
    figures = [max([len(visible(name)), *map(len, cells)]) for name, cells in columns.items()]
    names = max([len("clause"), *(len(row.name) for row in rows)])
    borders = 3 * (3 + len(backends)) + 1
    room = max(8, min(46, width - names - len("prop.") - sum(figures) - borders))
    table.add_column("clause", style="bold", no_wrap=True)
    table.add_column("says", style="dim", no_wrap=True)
    table.add_column("prop.", justify="right", no_wrap=True)
    for name in backends:
        table.add_column(Text(visible(name)), justify="right", no_wrap=True)
    for place, row in enumerate(rows):
        title = row.title if len(row.title) <= room else row.title[: room - 1] + "…"
        table.add_row(
            Text(visible(row.name)),
            Text(visible(title)),
            str(row.properties),
            *(columns[name][place] for name in backends),
        )
    return table


def _cell(status: Status, cases: int) -> Text:
    return Text(f"{status} {cases:,}" if cases else status, style=STYLE[status])


def print_report(console: Console, report: Report) -> None:
    """The table, the failures and the closing lines."""
    console.print(conformance_table(report, console.width))
    for failure, others in alike(report.failures):
        told = Text(paragraphs(describe(_failure(failure), failure.command)))
        if others:
            told.append(f"\n  the same in {len(others)} more: {', '.join(others)}")
        console.print(Panel(told, border_style=STYLE[failure.kind], title=Text(failure.statements[0])))
    console.print(closing(report))


def _failure(part: FailurePart) -> Failure:
    case = json.dumps(part.case) if isinstance(part.case, dict) else part.case
    return Failure(
        part.property, part.backend, tuple(part.statements), part.kind, part.message, part.stage, case, part.replay
    )


def counted(counts: dict[Status, int]) -> str:
    """All counts in words, zeros too."""
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES)


def at_most(report: Report) -> str:
    """How long a case might take, in words; nothing where there was no limit."""
    return "" if report.case_limit is None else f", at most {report.case_limit:g} s a case"


def closing(report: Report) -> RenderableType:
    """How much was compared, how far the values were, and the verdicts."""
    lines = [
        Text(
            f"{report.cases:,} compared cases, {report.calls:,} calls, in {report.seconds:.0f} s "
            f"({report.cases_per_second:.0f} cases, {report.calls_per_second:.0f} calls a second within properties), "
            f"profile {how_much(report)}{at_most(report)}"
        )
    ]
    largest = {part.backend: part for part in report.distances if part.compared == "output" and part.percentiles}
    for backend in report.backends:
        if part := largest.get(backend.name):
            far = f"{part.percentiles['100']:.2f} in {part.count:,} comparisons"
            lines.append(Text(f"largest |Δ|/σ of an output, {backend.name}: {far}"))
    if lacking := shortfall(report):
        lines.append(Text(f"Cut short: {lacking}", style="bold yellow"))
    if part_name := part_of(report):
        lines.append(Text(f"Of {part_name}: the others are needed for a verdict"))
    for backend in report.backends:
        style = "bold green" if backend.verdict in ("conforms", "passed in this shard") else "bold red"
        lines.append(Text(f"{backend.name}: {backend.verdict}. {counted(backend.counts)}", style=style))
        if empty := vacuous(report, backend.name):
            lines.append(Text(f"  {empty}", style=STYLE["vacuous"]))
    return Group(*lines)
