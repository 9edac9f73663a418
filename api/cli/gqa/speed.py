"""lyra gqa speed: prefill and decode of MHA, GQA and MQA, side by side in one run."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from lyra.progress import steps as progress_bar
from lyra.quantities import duration, size
from lyra.spec.attention import RopeSpec, grouped
from lyra.speed.workers import Workers
from lyra.studies.figures import check_figure, save
from lyra.studies.gqa_figures import speed_figure
from lyra.studies.parameters import groupings
from lyra.studies.speed import Load, Phase, measure, repeating
from lyra.terminal import table_of

from ..files import check_files
from ..options import MOST_THREADS, MOST_TOKENS, JsonPath
from ..output import show
from .group import CORES, MOST_WIDTH, Backends, Cell, Heads, KVHeads, Plot, chosen_backends, chosen_kv_heads, gqa

FASTER: dict[str, Cell] = {
    "": lambda row: f"{row['backend']}, {row['kind']}",
    "time": lambda row: duration(row["seconds"]),
    "faster": lambda row: f"{row['faster']:.2f}×",
    "quartiles": lambda row: f"{row['low']:.2f}–{row['high']:.2f}",
    "floor": lambda row: duration(row["floor"]),
    "floors": lambda row: f"{row['seconds'] / row['floor']:.1f}",
    "alone": lambda row: f"{row['floor_faster']:.2f}×",
}
REPEATED: dict[str, Cell] = {
    "": FASTER[""],
    "slower": lambda row: f"{row['slower']:.2f}×",
    "quartiles": FASTER["quartiles"],
}
WORK: dict[str, Cell] = {
    "": lambda row: f"{row['phase']}, {row['kind']}",
    "read": lambda row: size(row["read"]),
    "million operations": lambda row: f"{row['operations'] / 1e6:,.0f}",
    "of them attention": lambda row: f"{row['attention_operations'] / 1e6:,.0f}",
}


@gqa.command()
def speed(
    backend: Backends = ["torch", "jax"],  # noqa: B006 (typer copies it)
    kv_heads: KVHeads = None,
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
    chosen = chosen_kv_heads(kv_heads, heads, groupings(heads))
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
    sizes = {"hidden_size": width, "heads": heads, "head_dim": spec.head_dim}
    data = {**sizes, "batch": batch, "tokens": tokens, "prompt": prompt, "rows": rows, "repeated": repeated}
    if plot is not None:
        save(speed_figure(f"one layer of {heads} heads, width {width}: speed against MHA", rows), plot)
    layer = f"one layer, width {width:,}, {heads} query heads of {spec.head_dim}, float32"
    titles = {"decode": f"{batch} rows of {tokens:,} tokens", "prefill": f"one row of {prompt:,} tokens"}
    tables = [
        table_of(
            f"{phase.capitalize()}: {titles[phase]}\n{layer}",
            [row for row in rows if row["phase"] == phase],
            FASTER,
            group=lambda row: row["backend"],
            caption="floors: the time in floors; alone: how much faster the floor is",
            no_wrap=True,
        )
        for phase in loads
    ]
    tables.append(table_of("Decode with repeated keys and values", repeated, REPEATED, min_width=12))
    of_one = [row for row in rows if row["backend"] == backends[0]]
    tables.append(table_of("What must be read and multiplied", of_one, WORK, group=lambda row: row["phase"]))
    show(data, json_path, *tables)
