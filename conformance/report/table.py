"""The report in a terminal: clause × backend, then every failure with what a person needs."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lyra.conformance.record import SEVERITY, Record, Status
from lyra.conformance.replay import describe
from lyra.spec.clauses import clauses

STYLE: dict[Status, str] = {"passed": "green", "failed": "bold red", "errored": "bold magenta", "unsupported": "yellow"}


def clause_status(record: Record, backends: list[str]) -> dict[str, dict[str, tuple[Status, int]]]:
    """Per clause and backend the gravest status of its properties, and how many cases they compared.

    A property counts for every clause it cites.
    """
    found: dict[str, dict[str, tuple[Status, int]]] = defaultdict(dict)
    for prop in record.properties.values():
        for clause in dict.fromkeys(one.rpartition("-")[0] for one in prop.statements):
            for backend in backends:
                tally = prop.tally(backend)
                before, cases = found[clause].get(backend, ("unsupported", 0))
                worst = max(before, tally.status, key=SEVERITY.index)
                found[clause][backend] = (worst, cases + tally.cases)
    return found


def conformance_table(record: Record, backends: list[str]) -> Table:
    """Clause × backend, in the order of SPEC.md."""
    table = Table(title="Conformance by clause", title_justify="left")
    table.add_column("clause", style="bold")
    table.add_column("says", style="dim", overflow="ellipsis", no_wrap=True, max_width=46)
    table.add_column("properties", justify="right")
    for backend in backends:
        table.add_column(backend, justify="right")
    status = clause_status(record, backends)
    for clause in clauses().values():
        if clause.name not in status:
            continue
        citing = sum(any(s.startswith(f"{clause.name}-") for s in p.statements) for p in record.properties.values())
        cells = [_cell(*status[clause.name][backend]) for backend in backends]
        table.add_row(clause.name, clause.title, str(citing), *cells)
    return table


def _cell(status: Status, cases: int) -> Text:
    return Text(f"{status} {cases:>5,}" if cases else status, style=STYLE[status])


def print_report(console: Console, record: Record, backends: list[str], *, profile: str, seconds: float) -> None:
    """The table, the failures and one closing line."""
    console.print(conformance_table(record, backends))
    for failure in record.failures.values():
        console.print(Panel(Text(describe(failure)), border_style=STYLE[failure.kind], title=failure.statements[0]))
    console.print(closing(record, backends, profile=profile, seconds=seconds))


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
    counts = ", ".join(f"{record.count(status)} {status}" for status in ("passed", "failed", "errored", "unsupported"))
    verdict = "conforms" if record.ok else "does not conform"
    lines.append(Text(f"{' and '.join(backends)} {verdict}: {counts}", style="bold green" if record.ok else "bold red"))
    return Group(*lines)
