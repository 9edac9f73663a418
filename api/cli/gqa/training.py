"""lyra gqa perplexity and lyra gqa uptrain: small language models that differ in KV heads, trained and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lyra.checkpoint import cache_folder
from lyra.progress import steps as progress_bar
from lyra.quantities import size
from lyra.speed.workers import Workers
from lyra.studies.corpus import Corpus, read_corpus
from lyra.studies.figures import check_figure, save
from lyra.studies.gqa_figures import curve_figure, perplexity_figure, uptraining_figure
from lyra.studies.language_model import LMSpec
from lyra.studies.parallel import train_all
from lyra.studies.parameters import groupings
from lyra.studies.perplexity import EDGE, as_data, distance, summary, sweep
from lyra.studies.speed import Load, in_turns
from lyra.studies.training import Recipe
from lyra.studies.uptraining import conversions
from lyra.studies.uptraining import summary as uptraining_summary
from lyra.terminal import table_of

from ..files import check_files
from ..options import MOST_THREADS, MOST_TOKENS, JsonPath
from ..output import show
from .group import CORES, MOST_WIDTH, Backends, Cell, Heads, KVHeads, Plot, chosen_backends, chosen_kv_heads, gqa

CACHED = Load(batch=8, tokens=2048)
"""What a decode step of a trained model is timed with, and the bytes of keys and values are given for."""

Text = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="The text to train on; else Python's language reference.")
]
Seeds = Annotated[
    int, typer.Option(min=1, max=1000, help="Models of each kind, each with weights and data order of its own.")
]
Steps = Annotated[int, typer.Option(min=1, max=10_000_000, help="Steps of training.")]
Rows = Annotated[int, typer.Option(min=1, max=65_536, help="Windows in a step.")]
Window = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens that a window predicts.")]
Width = Annotated[int, typer.Option(min=1, max=MOST_WIDTH, help="hidden_size; the MLP is three times as wide.")]
Layers = Annotated[int, typer.Option(min=1, max=1000, help="Layers.")]
Vocabulary = Annotated[
    int, typer.Option(min=256, max=1_000_000, help="Tokens of the BPE that is trained on the text; 256: bytes.")
]
Checkpoints = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where models are kept, else the user's cache folder.")
]
Processes = Annotated[
    int, typer.Option(min=1, max=MOST_THREADS, help="Models that are trained at the same time, each on one core.")
]

NAME: Cell = lambda row: row["name"]  # noqa: E731 (a column like the others)
PERPLEXITY: dict[str, Cell] = {
    "": NAME,
    "parameters": lambda row: f"{row['parameters']:,}",
    "perplexity": lambda row: f"{row['perplexity']:.2f}{_error(row['deviation'], 2)}",
    "nats more": lambda row: (
        f"{row['loss_change']:+.3f}{_error(row['loss_change_error'], 3)}" if row["loss_change"] else ""
    ),
    "K and V": lambda row: size(row["cache_bytes"]),
}
DECODE: dict[str, Cell] = {"decode": lambda row: f"{row['decode_faster']:.2f}×"}
STABILITY: dict[str, Cell] = {
    "": NAME,
    "training loss": lambda row: f"{row['first_loss']:.2f} to {row['last_loss']:.2f}",
    "largest gradient norm": lambda row: f"{row['largest_gradient_norm']:.2f}",
    "stable": lambda row: "yes" if row["stable"] else "no",
}
SAID = {
    "mean": "mean of the group", "first": "first of the group", "random": "random", "whole": "all, as they were",
}  # fmt: skip
UPTRAINING: dict[str, Cell] = {
    "": lambda row: row["kind"],
    "KV heads made from": lambda row: SAID[row["start"]],
    "loss, MHA": lambda row: f"{row['original']:.3f}",
    "converted": lambda row: f"{row['at_start']:.3f}",
    "trained on": lambda row: f"{row['at_end']:.3f}",
}


@gqa.command()
def perplexity(
    text: Text = None,
    backend: Backends = ["torch"],  # noqa: B006 (typer copies it)
    kv_heads: KVHeads = None,
    seeds: Seeds = 3,
    steps: Steps = 300,
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
    chosen = chosen_kv_heads(kv_heads, heads, groupings(heads))
    backends = chosen_backends(backend)
    corpus, spec = _study(text, vocabulary, window, heads, width, layers)
    tasks = sweep(spec, recipe, chosen, seeds, backends)
    with progress_bar("Training") as move:
        runs = train_all(tasks, corpus, checkpoints or cache_folder() / "gqa", processes, move)
    found, apart = summary(runs, CACHED.tokens), distance(runs)
    if timed:
        with Workers(CORES) as workers, progress_bar("Timing") as move:
            for number, name in enumerate(backends):
                move(name, number, len(backends))
                of_backend = (row for row in found if row["backend"] == name)
                specs = [spec.replace(num_kv_heads=heads).to_dict() for heads in chosen]
                for row, times in zip(of_backend, in_turns(name, "model_decode", specs, CACHED, workers), strict=True):
                    row["decode_seconds"], row["decode_faster"] = times["seconds"], times["faster"]
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
    named = [row | {"name": f"{row['kind']}, {row['backend']}" if len(backends) > 1 else row["kind"]} for row in found]
    title = f"{_told(corpus)}\n{steps:,} steps of {rows} × {window} tokens, {seeds} seeds"
    step = f"; decode: how much faster, {CACHED.batch} rows" if timed else ""
    caption = f"K and V: of {CACHED.tokens:,} tokens in float32{step}"
    tables = [
        table_of(title, named, PERPLEXITY | (DECODE if timed else {}), caption=caption),
        table_of(f"Stability: the first and the last {EDGE} steps", named, STABILITY),
    ]
    notes = [] if apart is None else [
        f"The backends' curves are at most {apart['loss']:.1e} nats apart in a step's loss, {apart['held_out']:.1e} in "
        "the held-out loss."
    ]  # fmt: skip
    show(data, json_path, *tables, *notes)


@gqa.command()
def uptrain(
    text: Text = None,
    backend: Annotated[str, typer.Option("--backend", "-b", help="torch or jax.")] = "torch",
    kv_heads: Annotated[str | None, typer.Option(help="KV heads to convert to, such as 4,1; else all legal.")] = None,
    uptraining: Annotated[int, typer.Option(min=1, max=10_000_000, help="Steps after the conversion.")] = 40,
    seeds: Seeds = 3,
    steps: Steps = 300,
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
    chosen = chosen_kv_heads(kv_heads, heads, groupings(heads)[1:], " to convert to")
    (backend,) = chosen_backends([backend])
    corpus, spec = _study(text, vocabulary, window, heads, width, layers)
    originals = sweep(spec, recipe, [heads], seeds, [backend])
    tasks = conversions(originals, chosen, uptraining)
    with progress_bar("Training") as move:
        runs = train_all([*originals, *tasks], corpus, checkpoints or cache_folder() / "gqa", processes, move)
    found = uptraining_summary(runs)
    data = {
        "text": corpus.name,
        "backend": backend,
        "model": spec.model_dump(),
        "recipe": recipe.model_dump(),
        "uptraining": tasks[0].recipe.model_dump(),
        "rows": found,
    }
    if plot is not None:
        save(uptraining_figure(f"{corpus.name}: held-out loss after conversion from MHA", found), plot)
    title = f"{_told(corpus)}\n{seeds} MHA models of {steps:,} steps, {uptraining:,} more after the conversion"
    caption = "Cross-entropy of the held-out text, nats a token."
    by_kind = lambda row: (row["kind"], row["start"] == "whole")  # noqa: E731
    show(data, json_path, table_of(title, found, UPTRAINING, left=2, group=by_kind, caption=caption))


def _study(
    text: Path | None, vocabulary: int, window: int, heads: int, width: int, layers: int
) -> tuple[Corpus, LMSpec]:
    """The text in tokens, and the model with MHA. Raises InputError, SpecError, OSError."""
    corpus = read_corpus(text, vocabulary, window)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_layers": layers}
    return corpus, LMSpec(vocab_size=corpus.vocab_size, num_heads=heads, num_kv_heads=heads, **sizes)


def _told(corpus: Corpus) -> str:
    """What was read, for people."""
    unit = "bytes" if corpus.bytes_per_token == 1 else "tokens"
    return (
        f"{corpus.name}: {len(corpus.train):,} {unit} to train on, {len(corpus.held_out):,} held out"
        f" ({corpus.bytes_per_token:.2f} bytes each)"
    )


def _error(value: float | None, digits: int) -> str:
    return "" if value is None else f" ± {value:.{digits}f}"
