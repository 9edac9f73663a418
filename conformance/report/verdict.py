"""The exit code of a run, of `lyra conform`, `lyra merge` and pytest: its report decides, here and nowhere else."""

from __future__ import annotations

from .data import Report

PASSED, NOT_PASSED, NO_REPORT = 0, 1, 2


def exit_code(report: Report | None) -> int:
    """0 where something was compared and all passed, 1 where it did not or not all was run, 2 without a report."""
    if report is None:
        return NO_REPORT
    return PASSED if report.ok else NOT_PASSED
