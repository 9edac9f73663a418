"""How commands show what they found: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import RenderableType
from rich.table import Table

from lyra.spec.files import write_atomically
from lyra.terminal import console, new_table, visible

from .files import STANDARD


def show(data: Mapping[str, Any], json_path: Path | None, *tables: RenderableType) -> None:
    """Print the tables, and write the data to a JSON file if one is named; "-" prints the data instead."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    if json_path == STANDARD:
        typer.echo(text, nl=False)
        return
    if json_path is not None:
        write_atomically(json_path, text.encode())
    printer = console()
    for table in tables:
        printer.print(table)


def fields_table(title: str, fields: Mapping[str, Any]) -> Table:
    """A table of names and values."""
    table = new_table(title, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in fields.items():
        table.add_row(name, visible(value))
    return table


def head_list(heads: tuple[int, ...] | list[int]) -> str:
    """Heads for people: 0, 1, 8-15, or none."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs) or "none"
