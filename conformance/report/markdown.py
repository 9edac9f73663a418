"""The report as Markdown: what a CI job shows as its summary."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from .data import STATUSES, Report, part_of, shortfall, vacuous
from .page import SIGN
from .table import counted

VARIABLE = "GITHUB_STEP_SUMMARY"
SHOWN = 20
"""Failures in full; a job's summary has a limit of size, and the page has all of them."""


def markdown(report: Report) -> str:
    """Verdicts, clause × backend table and the first failures."""
    lines = ["### Lyra conformance", ""]
    for one in report.backends:
        lines.append(f"- **{one.name}: {one.verdict}.** {counted(one.counts)}")
        if empty := vacuous(report, one.name):
            lines.append(f"  {empty}")
    lines += [""]
    if lacking := shortfall(report):
        lines += [f"**Cut short: {lacking}.**", ""]
    if part := part_of(report):
        lines += [f"Of {part}: the others are needed for a verdict.", ""]
    lines += [f"{report.cases:,} compared cases, profile {report.profile}, seed {report.seed}.", ""]
    names = [backend.name for backend in report.backends]
    lines += [_row(["clause", "says", *names]), _row(["---"] * (2 + len(names)))]
    for clause in report.clauses:
        cells = [
            ", ".join(f"{SIGN[s]} {clause.counts[name][s]} {s}" for s in STATUSES if clause.counts[name][s])
            for name in names
        ]
        lines.append(_row([clause.name, clause.title, *cells]))
    for failure in report.failures[:SHOWN]:
        lines += ["", f"**{failure.kind}: {failure.backend}, {failure.property}** ({', '.join(failure.statements)})"]
        stage = [f"first diverging stage: {failure.stage}"] if failure.stage else []
        command = [failure.command] if failure.command else []
        lines += ["", "```text", failure.message.replace("```", "'''"), f"case: {failure.picture}", *stage, *command]
        lines.append("```")
    if len(report.failures) > SHOWN:
        lines += ["", f"{len(report.failures) - SHOWN} more failures stand in the report."]
    return "\n".join(lines) + "\n"


def append_summary(report: Report, environment: Mapping[str, str] = os.environ) -> None:
    """Append to the job's summary where the run is a CI job that has one."""
    if path := environment.get(VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(markdown(report) + "\n")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
