"""How commands show what they found: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.table import Table

from lyra.spec.base import write_atomically
from lyra.spec.errors import InputError


def show(data: Mapping[str, Any], json_path: Path | None, *tables: RenderableType) -> None:
    """Print the tables, and write the data to a JSON file if one is named; "-" prints the data instead."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    if json_path == Path("-"):
        typer.echo(text, nl=False)
        return
    if json_path is not None:
        write_atomically(json_path, text.encode())
    console = Console()
    for table in tables:
        console.print(table)


def fields_table(title: str, fields: Mapping[str, Any]) -> Table:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in fields.items():
        table.add_row(name, str(value))
    return table


def size(count: int) -> str:
    """Bytes for people: 12,345 bytes as 12.1 KiB."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def head_list(heads: tuple[int, ...] | list[int]) -> str:
    """Heads for people: 0, 1, 8-15, or none."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs) or "none"


def refuse_missing_folder(*paths: Path | None) -> None:
    """Files that cannot be written are refused before the work, not after it. Raises InputError for the first."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
