"""Where a report goes: to files that are asked for, and to the summary of a CI job."""

from __future__ import annotations

from pathlib import Path

from lyra.conformance.session import Session
from lyra.spec.files import write_atomically

from .data import Report, report_data
from .markdown import append_summary
from .page import html
from .verdict import exit_code


def write_report(report: Report, json_path: Path | None, page: Path | None) -> None:
    """Write the report as JSON and as a page where a path is given, and append it to a CI job's summary."""
    if json_path is not None:
        write_atomically(json_path, (report.model_dump_json(indent=2) + "\n").encode())
    if page is not None:
        write_atomically(page, html(report).encode())
    append_summary(report)


def finish(session: Session, json_path: Path | None, page: Path | None, *, seconds: float) -> int:
    """Write the report of a run that took so many seconds, where a path is given; the exit code that it means."""
    report = report_data(session, seconds)
    if json_path is not None or page is not None:
        write_report(report, json_path, page)
    return exit_code(report)
