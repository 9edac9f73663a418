"""`lyra merge`: one report out of those of the shards of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lyra.backends.protocol import import_extra
from lyra.terminal import console

from .files import check_files


def merge(
    reports: Annotated[list[Path], typer.Argument(help="What `lyra conform --shard i/n --json` wrote, for every i.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    report: Annotated[Path | None, typer.Option(metavar="PATH.html", help="Write the report as one HTML page.")] = None,
) -> None:
    """Put the reports of all shards of a run together, and say what the whole run found.

    Exit code 0: all passed; 1: something failed or errored, or a shard is missing; 2: usage.
    """
    import_extra("hypothesis", "conformance")
    from lyra.conformance.report.merge import merged, read_report
    from lyra.conformance.report.table import print_report
    from lyra.conformance.report.verdict import exit_code
    from lyra.conformance.report.write import write_report

    check_files(json_path, report, inputs=reports)
    found = merged({str(path): read_report(path) for path in dict.fromkeys(reports)})
    print_report(console(), found)
    write_report(found, json_path, report)
    raise typer.Exit(exit_code(found))
