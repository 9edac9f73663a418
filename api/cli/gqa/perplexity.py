"""lyra gqa perplexity: the same small language model with 8, 4, 2 and 1 KV heads, trained and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lyra.progress import steps as progress_bar
from lyra.spec.errors import SpecError
from lyra.speed.workers import Workers
from lyra.studies.figures import check_figure, save
from lyra.studies.parallel import train_all
from lyra.studies.parameters import groupings
from lyra.studies.perplexity import EDGE, Sweep, as_data, distance, summary
from lyra.studies.speed import Load, model_steps
from lyra.studies.training import Recipe
from lyra.studies.training_figures import curve_figure, perplexity_figure
from lyra.terminal import new_table

from ..files import check_files
from ..options import JsonPath, numbers
from ..output import show, size
from .group import (
    CORES,
    Backends,
    Checkpoints,
    Heads,
    Layers,
    Plot,
    Processes,
    Rows,
    Seeds,
    Steps,
    Text,
    Vocabulary,
    Width,
    Window,
    checkpoint_folder,
    chosen_backends,
    corpus_line,
    gqa,
    study,
)

STEPS = 300
"""Of training, by default."""

CACHED = Load(batch=8, tokens=2048)
"""What a decode step of a trained model is timed with, and the bytes of keys and values are given for."""


@gqa.command()
def perplexity(
    text: Text = None,
    backend: Backends = ["torch"],  # noqa: B006 (typer copies it)
    kv_heads: Annotated[str | None, typer.Option(help="KV heads to compare, such as 8,4,1; else all legal.")] = None,
    seeds: Seeds = 3,
    steps: Steps = STEPS,
    rows: Rows = 8,
    window: Window = 128,
    width: Width = 128,
    layers: Layers = 4,
    heads: Heads = 8,
    vocabulary: Vocabulary = 1024,
    checkpoints: Checkpoints = None,
    processes: Processes = CORES,
    timed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time a decode step of every kind.")] = True,
    json_path: JsonPath = None,
    plot: Plot = None,
    curves: Annotated[Path | None, typer.Option(metavar="PATH", help="Draw losses and gradient norms.")] = None,
) -> None:
    """Train one small language model with each number of KV heads and compare perplexity on text held out.

    An interrupted run goes on where it stopped when the same command is given again; models that are trained already
    are read.
    """
    check_figure(plot, curves)
    check_files(plot, curves, json_path=json_path, inputs=(text,), folders=(checkpoints,))
    recipe = Recipe(steps=steps, rows=rows, window=window)
    chosen = groupings(heads) if kv_heads is None else numbers(kv_heads, heads + 1, "KV heads")
    if not chosen:
        raise SpecError("no KV heads are named; write a list such as 8,4,1")
    backends = chosen_backends(backend)
    corpus, spec = study(text, vocabulary, recipe, heads, width, layers)
    plan = Sweep(spec, recipe, chosen, seeds, backends)
    with progress_bar("Training") as move:
        runs = train_all(plan.tasks(), corpus, checkpoint_folder(checkpoints), processes, move)
    found, apart = summary(runs, CACHED.tokens), distance(runs)
    if timed:
        with Workers(CORES) as workers, progress_bar("Timing") as move:
            for number, name in enumerate(plan.backends):
                move(name, number, len(plan.backends))
                _add_times(found, name, model_steps(spec, chosen, CACHED, name, workers))
    data = {
        "text": corpus.name,
        "held_out_tokens": len(corpus.held_out),
        "bytes_per_token": corpus.bytes_per_token,
        "model": spec.model_dump(),
        "recipe": recipe.model_dump(),
        "cached_tokens": CACHED.tokens,
        "decoded_rows": CACHED.batch,
        "rows": found,
        "distance": apart,
        "runs": [as_data(run) for run in runs],
    }
    if plot is not None:
        save(perplexity_figure(f"{corpus.name}: perplexity of held-out text", found), plot)
    if curves is not None:
        save(curve_figure(f"{corpus.name}: training", [(run.task.spec.kind, run.curve) for run in runs]), curves)
    table = _table(f"{corpus_line(corpus)}\n{steps:,} steps of {rows} × {window} tokens, {seeds} seeds", found)
    notes = [] if apart is None else [_distance_line(apart)]
    show(data, json_path, table, _stability_table(found), *notes)


def _add_times(rows: list[dict[str, Any]], backend: str, times: list[dict[str, float]]) -> None:
    """Give the rows of a backend what a decode step of each takes."""
    for row, one in zip((row for row in rows if row["backend"] == backend), times, strict=True):
        row["decode_seconds"], row["decode_faster"] = one["seconds"], one["faster"]


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = new_table(title)
    table.add_column("", style="bold")
    timed = "decode_faster" in rows[0]
    for column in ("parameters", "perplexity", "nats more", "K and V", *(["decode"] if timed else [])):
        table.add_column(column, justify="right")
    for name, row in _named(rows):
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.2f}"
        error = "" if row["loss_change_error"] is None else f" ± {row['loss_change_error']:.3f}"
        table.add_row(
            name,
            f"{row['parameters']:,}",
            f"{row['perplexity']:.2f}{spread}",
            f"{row['loss_change']:+.3f}{error}" if row["loss_change"] else "",
            size(row["cache_bytes"]),
            *([f"{row['decode_faster']:.2f}×"] if timed else []),
        )
    step = f"; decode: how much faster, {CACHED.batch} rows" if timed else ""
    table.caption, table.caption_justify = f"K and V: of {CACHED.tokens:,} tokens in float32{step}", "left"
    return table


def _stability_table(rows: list[dict[str, Any]]) -> Table:
    table = new_table(f"Stability: the first and the last {EDGE} steps")
    table.add_column("", style="bold")
    for column in ("training loss", "largest gradient norm", "stable"):
        table.add_column(column, justify="right")
    for name, row in _named(rows):
        fell = f"{row['first_loss']:.2f} to {row['last_loss']:.2f}"
        table.add_row(name, fell, f"{row['largest_gradient_norm']:.2f}", "yes" if row["stable"] else "no")
    return table


def _named(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Rows with what people call them: the backend, too, where there are several."""
    several = len({row["backend"] for row in rows}) > 1
    return [(f"{row['kind']}, {row['backend']}" if several else row["kind"], row) for row in rows]


def _distance_line(apart: dict[str, float]) -> str:
    return (
        f"The backends' curves are at most {apart['loss']:.1e} nats apart in a step's loss, {apart['held_out']:.1e} in "
        "the held-out loss."
    )
