"""The group `lyra gqa`, and what its commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lyra.spec.errors import SpecError
from lyra.studies.training import check_backend

from ..options import numbers

MOST_HEADS, MOST_WIDTH = 1024, 65_536
"""Several times what the largest models have: where these options end."""

CORES = os.cpu_count() or 1

gqa = typer.Typer(no_args_is_help=True, help="What sharing KV heads saves and what it costs: MHA, GQA, MQA.")

Plot = Annotated[Path | None, typer.Option("--plot", metavar="PATH", help="Draw it: a .png or .svg file.")]
Backends = Annotated[list[str], typer.Option("--backend", "-b", help="torch or jax; may be given twice.")]
Heads = Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Query heads.")]
KVHeads = Annotated[str | None, typer.Option(help="KV heads to compare, such as 8,4,1; else all legal.")]

Cell = Callable[[dict[str, Any]], str]
"""What a column of a table says of a row."""


def chosen_backends(names: list[str]) -> tuple[str, ...]:
    """The named backends, each once. Raises InputError for one that the studies have no code for."""
    for name in names:
        check_backend(name)
    return tuple(dict.fromkeys(names))


def chosen_kv_heads(named: str | None, heads: int, legal: tuple[int, ...], to_convert: str = "") -> tuple[int, ...]:
    """The numbers of KV heads that an option lists, or all legal ones. Raises SpecError."""
    chosen = legal if named is None else numbers(named, heads + 1, "KV heads")
    if not chosen:
        raise SpecError(f"no KV heads{to_convert} are named; write a list such as {'4,1' if to_convert else '8,4,1'}")
    return chosen
