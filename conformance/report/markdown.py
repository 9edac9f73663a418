"""The report as Markdown: what a CI job shows as its summary."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from lyra.terminal import paragraphs, visible

from .data import STATUSES, Report, alike, how_much, part_of, shortfall, vacuous
from .page import SIGN
from .table import counted

VARIABLE = "GITHUB_STEP_SUMMARY"
MARKUP = re.compile(r"[\\`*_\[\]<>|~#&$!]")
"""What Markdown, and the HTML in it, may take for more than itself."""

SHOWN = 20
"""Failures in full; a job's summary has a limit of size, and the page has all of them."""


def markdown(report: Report) -> str:
    """Verdicts, clause × backend table and the first failures."""
    lines = ["### Lyra conformance", ""]
    for backend in report.backends:
        lines.append(f"- **{inline(backend.name)}: {backend.verdict}.** {counted(backend.counts)}")
        if empty := vacuous(report, backend.name):
            lines.append(f"  {inline(empty)}")
    lines += [""]
    if lacking := shortfall(report):
        lines += [f"**Cut short: {lacking}.**", ""]
    if part := part_of(report):
        lines += [f"Of {part}: the others are needed for a verdict.", ""]
    lines += [f"{report.cases:,} compared cases, profile {how_much(report)}, seed {report.seed}.", ""]
    names = [backend.name for backend in report.backends]
    heads = [inline(name) for name in names]
    lines += [_row(["clause", "says", *heads]), _row(["---"] * (2 + len(names)))]
    for clause in report.clauses:
        cells = [
            ", ".join(f"{SIGN[s]} {clause.counts[name][s]} {s}" for s in STATUSES if clause.counts[name][s])
            for name in names
        ]
        lines.append(_row([inline(clause.name), inline(clause.title), *cells]))
    told = alike(report.failures)
    for failure, others in told[:SHOWN]:
        cited = inline(", ".join(failure.statements))
        lines += ["", f"**{failure.kind}: {inline(failure.backend)}, {inline(failure.property)}** ({cited})"]
        lines += ["", "```text"]
        lines += [fenced(failure.message), fenced(f"case: {failure.picture}")]
        lines += [fenced(f"first diverging stage: {failure.stage}")] if failure.stage else []
        lines += [fenced(failure.command)] if failure.command else []
        lines += [fenced(f"the same in {len(others)} more: {', '.join(others)}")] if others else []
        lines.append("```")
    if len(told) > SHOWN:
        lines += ["", f"{len(told) - SHOWN} more failures stand in the report."]
    return "\n".join(lines) + "\n"


def append_summary(report: Report, environment: Mapping[str, str] = os.environ) -> None:
    """Append to the job's summary where the run is a CI job that has one."""
    if path := environment.get(VARIABLE):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(markdown(report) + "\n")


def inline(text: str) -> str:
    """A text from outside within a line of Markdown, which takes nothing in it for markup."""
    return MARKUP.sub(r"\\\g<0>", visible(text))


def fenced(text: str) -> str:
    """The same within a block of code, which it cannot end."""
    return paragraphs(text).replace("```", "'''")


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
