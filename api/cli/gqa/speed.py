"""lyra gqa speed: prefill and decode of MHA, GQA and MQA, side by side in one run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.table import Table

from lyra.progress import steps as progress_bar
from lyra.spec.attention import RopeSpec, grouped
from lyra.spec.errors import SpecError
from lyra.speed.show import duration
from lyra.speed.workers import Workers
from lyra.studies.figures import check_figure, save
from lyra.studies.parameters import groupings
from lyra.studies.speed import Load, Phase, measure, repeating
from lyra.studies.speed_figures import speed_figure
from lyra.terminal import new_table

from ..files import check_files
from ..options import MOST_THREADS, MOST_TOKENS, JsonPath, numbers
from ..output import show, size
from .group import CORES, MOST_WIDTH, Backends, Heads, Plot, chosen_backends, gqa


@gqa.command()
def speed(
    backend: Backends = ["torch", "jax"],  # noqa: B006 (typer copies it)
    kv_heads: Annotated[str | None, typer.Option(help="KV heads to compare, such as 8,4,1; else all legal.")] = None,
    heads: Heads = 8,
    width: Annotated[int, typer.Option(min=1, max=MOST_WIDTH, help="hidden_size.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, max=65_536, help="Rows of a decode step.")] = 8,
    tokens: Annotated[
        int, typer.Option(min=2, max=MOST_TOKENS, help="Tokens of every row, with the one that is decoded.")
    ] = 2048,
    prompt: Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens of a prefill, of one row.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, max=100_000, help="Turns of every contestant.")] = 15,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MOST_THREADS, help="Threads of every contestant; else one a core.")
    ] = None,
    json_path: JsonPath = None,
    plot: Plot = None,
) -> None:
    """Time one attention layer's prefill and decode step for each number of KV heads, in turns, against the floor.

    The floor is the time in which this machine can read the weights, keys and values and multiply what must be
    multiplied, both as measured in the same run.
    """
    check_figure(plot)
    check_files(plot, json_path=json_path)
    chosen = groupings(heads) if kv_heads is None else numbers(kv_heads, heads + 1, "KV heads")
    if not chosen:
        raise SpecError("no KV heads are named; write a list such as 8,4,1")
    spec = grouped(width, heads, rope=RopeSpec(theta=10_000.0))
    for number in chosen:
        spec.replace(num_key_value_heads=number)  # refused before anything is measured
    backends = chosen_backends(backend)
    if find_spec("torch") is None:
        raise ImportError("the floor is measured with 'torch', which is not installed: pip install 'lyra[torch]'")
    loads: dict[Phase, Load] = {"decode": Load(batch, tokens), "prefill": Load(1, prompt)}
    with Workers(threads or CORES) as workers, progress_bar("Measuring") as move:
        rows = measure(spec, chosen, loads, backends, workers, rounds, move)
        repeated = repeating(spec, chosen, loads["decode"], backends, workers, rounds)
    data = {
        "hidden_size": width,
        "heads": heads,
        "head_dim": spec.head_dim,
        "batch": batch,
        "tokens": tokens,
        "prompt": prompt,
        "rows": rows,
        "repeated": repeated,
    }
    if plot is not None:
        save(speed_figure(f"one layer of {heads} heads, width {width}: speed against MHA", rows), plot)
    layer = f"one layer, width {width:,}, {heads} query heads of {spec.head_dim}, float32"
    titles = {"decode": f"{batch} rows of {tokens:,} tokens", "prefill": f"one row of {prompt:,} tokens"}
    tables = [
        _table(f"{phase.capitalize()}: {titles[phase]}\n{layer}", [row for row in rows if row["phase"] == phase])
        for phase in loads
    ]
    tables.append(_repeated_table(repeated))
    show(data, json_path, *tables, _work_table([row for row in rows if row["backend"] == backends[0]]))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = new_table(title)
    table.add_column("", style="bold", no_wrap=True)
    for column in ("time", "faster", "quartiles", "floor", "floors", "alone"):
        table.add_column(column, justify="right", no_wrap=True)
    table.caption, table.caption_justify = "floors: the time in floors; alone: how much faster the floor is", "left"
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            f"{row['backend']}, {row['kind']}",
            duration(row["seconds"]),
            f"{row['faster']:.2f}×",
            f"{row['low']:.2f}–{row['high']:.2f}",
            duration(row["floor"]),
            f"{row['seconds'] / row['floor']:.1f}",
            f"{row['floor_faster']:.2f}×",
            end_section=following is None or following["backend"] != row["backend"],
        )
    return table


def _repeated_table(rows: list[dict[str, Any]]) -> Table:
    table = new_table("Decode with repeated keys and values")
    table.add_column("", style="bold")
    for column in ("slower", "quartiles"):
        table.add_column(column, justify="right", min_width=12)
    for row in rows:
        spread = f"{row['low']:.2f}–{row['high']:.2f}"
        table.add_row(f"{row['backend']}, {row['kind']}", f"{row['slower']:.2f}×", spread)
    return table


def _work_table(rows: list[dict[str, Any]]) -> Table:
    """What the floor is made of, the same for every backend."""
    table = new_table("What must be read and multiplied")
    table.add_column("", style="bold")
    for column in ("read", "million operations", "of them attention"):
        table.add_column(column, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(
            f"{row['phase']}, {row['kind']}",
            size(row["read"]),
            f"{row['operations'] / 1e6:,.0f}",
            f"{row['attention_operations'] / 1e6:,.0f}",
            end_section=following is None or following["phase"] != row["phase"],
        )
    return table
