"""The report in a terminal: clause × backend, then every failure with what a person needs."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lyra.conformance.record import Record, Status
from lyra.conformance.replay import describe

from .data import STATUSES, backend_part, by_clause

STYLE: dict[Status, str] = {"passed": "green", "failed": "bold red", "errored": "bold magenta", "unsupported": "yellow"}


def conformance_table(record: Record, backends: list[str], width: int = 100) -> Table:
    """Clause × backend, in the order of SPEC.md: the gravest status of the properties that cite it, and their cases.

    `width` is the screen's; the titles are cut so that the figures keep their lines.
    """
    table = Table(title="Conformance by clause", title_justify="left")
    rows = by_clause(record, backends)
    columns = {name: [_cell(row.status[name], row.cases[name]) for row in rows] for name in backends}
    figures = [max([len(name), *map(len, cells)]) for name, cells in columns.items()]
    names = max([len("clause"), *(len(row.name) for row in rows)])
    borders = 3 * (3 + len(backends)) + 1
    room = max(8, min(46, width - names - len("prop.") - sum(figures) - borders))
    table.add_column("clause", style="bold", no_wrap=True)
    table.add_column("says", style="dim", no_wrap=True)
    table.add_column("prop.", justify="right", no_wrap=True)
    for name in backends:
        table.add_column(name, justify="right", no_wrap=True)
    for place, row in enumerate(rows):
        title = row.title if len(row.title) <= room else row.title[: room - 1] + "…"
        table.add_row(row.name, title, str(row.properties), *(columns[name][place] for name in backends))
    return table


def _cell(status: Status, cases: int) -> Text:
    return Text(f"{status} {cases:,}" if cases else status, style=STYLE[status])


def print_report(console: Console, record: Record, backends: list[str], *, profile: str, seconds: float) -> None:
    """The table, the failures and one closing line."""
    console.print(conformance_table(record, backends, console.width))
    for failure in record.failures.values():
        console.print(Panel(Text(describe(failure)), border_style=STYLE[failure.kind], title=failure.statements[0]))
    console.print(closing(record, backends, profile=profile, seconds=seconds))


def counted(counts: dict[Status, int]) -> str:
    """All four counts in words, zeros too."""
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES)


def closing(record: Record, backends: list[str], *, profile: str, seconds: float) -> RenderableType:
    """How much was compared, how far the values were, and the verdict."""
    lines = [
        Text(
            f"{record.cases:,} compared cases in {seconds:.0f} s "
            f"({record.cases / max(record.seconds, 1e-9):.0f} a second within properties), profile {profile}"
        )
    ]
    for backend in backends:
        ratios = record.distances.get((backend, "output"))
        if ratios:
            lines.append(
                Text(f"largest |Δ|/σ of an output, {backend}: {max(ratios):.2f} in {len(ratios):,} comparisons")
            )
    if not record.complete:
        cut = f"Cut short: {record.finished} of {record.planned} properties ran"
        lines.append(Text(cut, style="bold yellow"))
    for part in (backend_part(record, name) for name in backends):
        style = "bold green" if part.verdict == "conforms" else "bold red"
        lines.append(Text(f"{part.name}: {part.verdict}. {counted(part.counts)}", style=style))
    return Group(*lines)
