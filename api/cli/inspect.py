"""lyra inspect: what is in a context."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from lyra.quantities import size
from lyra.spec.context import StaticContext
from lyra.spec.context_file import read_context
from lyra.spec.errors import UncheckedContextWarning
from lyra.spec.storage import Values, widened
from lyra.terminal import new_table

from .files import check_files
from .options import JsonPath
from .output import fields_table, head_list, show


def inspect(
    context: Annotated[Path, typer.Argument(help="The context's file.")],
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Hold what is there to the file's digests; else show it.")
    ] = True,
    json_path: JsonPath = None,
) -> None:
    """Show what a context holds and which model it came from."""
    check_files(json_path=json_path, inputs=(context,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncheckedContextWarning)  # the table says it
        loaded, digest, checked = read_context(StaticContext, context, verify)
    attention = loaded.fingerprint.attention.to_dict()
    data: dict[str, Any] = {"path": str(context)} | loaded.describe()
    data |= {"norms": norms(loaded), "attention": attention, "weights": dict(loaded.fingerprint.layers)}
    data["digest"] = None if digest is None else {"xxh3_128": digest, "checked": checked}
    said = "none: the file is older than digests; save the context again to give it one"
    if digest is not None:
        said = f"{digest}, {'as saved' if checked else 'not checked'}"
    show(data, json_path, *context_tables(str(context), loaded, {"digest": said}))


def context_tables(title: str, context: StaticContext, more: Mapping[str, str] | None = None) -> tuple[Table, Table]:
    """The context as a whole, with what more is to be said of it, and its layers."""
    found = context.describe()
    spec = context.fingerprint.attention
    whole = fields_table(
        title,
        {
            "model": found["model"],
            "tokens": f"{found['tokens']:,}" + (f" in {found['batch']} rows" if found["batch"] > 1 else ""),
            "next position": f"{found['next_position']:,}",
            "size": f"{size(found['bytes'])} in {found['dtype']}",
            "query / KV heads": f"{spec.num_attention_heads} / {spec.num_key_value_heads} of {spec.head_dim}",
            "spec version": found["spec_version"],
            **(more or {}),
        },
    )
    layers = new_table("layers")
    for name in ("layer", "KV heads", "mean key norm", "mean value norm"):
        layers.add_column(name, justify="right")
    for number, (key, value) in norms(context).items():
        layers.add_row(number, head_list(context.kv_heads[int(number)]), f"{key:.3f}", f"{value:.3f}")
    return whole, layers


def norms(context: StaticContext) -> dict[str, tuple[float, float]]:
    """By layer the mean length of its visible keys and values; 0 where none is visible."""

    def mean(values: Values) -> float:
        lengths = np.linalg.norm(widened(values), axis=-1).swapaxes(0, 1)[:, context.mask]
        return float(lengths.mean()) if lengths.size else 0.0

    return {str(number): (mean(layer.k), mean(layer.v)) for number, layer in context.layers.items()}
