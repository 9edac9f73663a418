"""lyra gqa uptrain: MHA models are given fewer KV heads, in three ways, and trained on."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from lyra.progress import steps as progress_bar
from lyra.spec.errors import SpecError
from lyra.studies.conversion import METHODS
from lyra.studies.figures import check_figure, save
from lyra.studies.parameters import groupings
from lyra.studies.training import Recipe, Start
from lyra.studies.training_figures import uptraining_figure
from lyra.studies.uptraining import Plan, summary
from lyra.studies.uptraining import uptrain as uptrained
from lyra.terminal import new_table

from ..files import check_files
from ..options import JsonPath, numbers
from ..output import show
from .group import (
    CORES,
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
from .perplexity import STEPS

SAID: dict[Start, str] = {
    "mean": "mean of the group",
    "first": "first of the group",
    "random": "random",
    "whole": "all, as they were",
}


@gqa.command()
def uptrain(
    text: Text = None,
    backend: Annotated[str, typer.Option("--backend", "-b", help="torch or jax.")] = "torch",
    kv_heads: Annotated[str | None, typer.Option(help="KV heads to convert to, such as 4,1; else all legal.")] = None,
    uptraining: Annotated[int, typer.Option(min=1, max=10_000_000, help="Steps after the conversion.")] = 40,
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
    json_path: JsonPath = None,
    plot: Plot = None,
) -> None:
    """Convert trained MHA models to fewer KV heads by pooling, by the first head and at random, and train them on.

    The MHA models are those of `lyra gqa perplexity` with the same options; they are trained where there are none. An
    interrupted run goes on where it stopped when the same command is given again.
    """
    check_figure(plot)
    check_files(plot, json_path=json_path, inputs=(text,), folders=(checkpoints,))
    recipe = Recipe(steps=steps, rows=rows, window=window)
    chosen = groupings(heads)[1:] if kv_heads is None else numbers(kv_heads, heads + 1, "KV heads")
    if not chosen:
        raise SpecError("no KV heads to convert to are named; write a list such as 4,1")
    (backend,) = chosen_backends([backend])
    corpus, spec = study(text, vocabulary, recipe, heads, width, layers)
    plan = Plan(backend, spec, recipe, seeds, chosen, uptraining)
    with progress_bar("Training") as move:
        found = summary(uptrained(plan, corpus, checkpoint_folder(checkpoints), processes, move))
    data = {
        "text": corpus.name,
        "backend": backend,
        "model": spec.model_dump(),
        "recipe": recipe.model_dump(),
        "uptraining": plan.further.model_dump(),
        "rows": found,
    }
    if plot is not None:
        save(uptraining_figure(f"{corpus.name}: held-out loss after conversion from MHA", found), plot)
    title = f"{corpus_line(corpus)}\n{seeds} MHA models of {steps:,} steps, {uptraining:,} more after the conversion"
    show(data, json_path, _table(title, found))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = new_table(title)
    table.add_column("", style="bold")
    table.add_column("KV heads made from")
    for column in ("loss, MHA", "converted", "trained on"):
        table.add_column(column, justify="right")
    for row in rows:
        losses = (f"{row[key]:.3f}" for key in ("original", "at_start", "at_end"))
        table.add_row(row["kind"], SAID[row["start"]], *losses, end_section=row["start"] in ("whole", METHODS[-1]))
    table.caption, table.caption_justify = "Cross-entropy of the held-out text, nats a token.", "left"
    return table
