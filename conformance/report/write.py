"""Where a report goes: to files that are asked for, and to the summary of a CI job."""

from __future__ import annotations

from pathlib import Path

from lyra.spec.files import write_atomically

from .data import Report
from .markdown import append_summary
from .page import html


def write_report(report: Report, json_path: Path | None, page: Path | None) -> None:
    """Write the report as JSON and as a page where a path is given, and append it to a CI job's summary."""
    if json_path is not None:
        write_atomically(json_path, (report.model_dump_json(indent=2) + "\n").encode())
    if page is not None:
        write_atomically(page, html(report).encode())
    append_summary(report)
