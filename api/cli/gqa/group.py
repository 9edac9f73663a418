"""The group `lyra gqa`, and what its commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lyra.checkpoint import cache_folder
from lyra.spec.errors import InputError
from lyra.studies.corpus import Corpus, read_corpus
from lyra.studies.language_model import LMSpec
from lyra.studies.training import LEARNERS, Recipe

from ..options import MOST_THREADS, MOST_TOKENS

MOST_HEADS, MOST_WIDTH = 1024, 65_536
"""Several times what the largest models have: where these options end."""

gqa = typer.Typer(no_args_is_help=True, help="What sharing KV heads saves and what it costs: MHA, GQA, MQA.")

Plot = Annotated[Path | None, typer.Option("--plot", metavar="PATH", help="Draw it: a .png or .svg file.")]
Text = Annotated[
    Path | None, typer.Argument(metavar="[FILE]", help="The text to train on; else Python's language reference.")
]
Backends = Annotated[list[str], typer.Option("--backend", "-b", help="torch or jax; may be given twice.")]
Seeds = Annotated[
    int, typer.Option(min=1, max=1000, help="Models of each kind, each with weights and data order of its own.")
]
Steps = Annotated[int, typer.Option(min=1, max=10_000_000, help="Steps of training.")]
Rows = Annotated[int, typer.Option(min=1, max=65_536, help="Windows in a step.")]
Window = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens that a window predicts.")]
Width = Annotated[int, typer.Option(min=1, max=MOST_WIDTH, help="hidden_size; the MLP is three times as wide.")]
Layers = Annotated[int, typer.Option(min=1, max=1000, help="Layers.")]
Heads = Annotated[int, typer.Option(min=1, max=MOST_HEADS, help="Query heads.")]
Vocabulary = Annotated[
    int, typer.Option(min=256, max=1_000_000, help="Tokens of the BPE that is trained on the text; 256: bytes.")
]
Checkpoints = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Where models are kept, else the user's cache folder."),
]


def chosen_backends(names: list[str]) -> tuple[str, ...]:
    """The named backends, each once. Raises InputError for one that the studies have no code for."""
    for name in names:
        if name not in LEARNERS:
            raise InputError(f"the studies know no backend {name!r}; expected {' or '.join(LEARNERS)}")
    return tuple(dict.fromkeys(names))


Processes = Annotated[
    int, typer.Option(min=1, max=MOST_THREADS, help="Models that are trained at the same time, each on one core.")
]
CORES = os.cpu_count() or 1


def checkpoint_folder(chosen: Path | None) -> Path:
    """The folder of the checkpoints."""
    return cache_folder() / "gqa" if chosen is None else chosen


def study(
    text: Path | None, vocabulary: int, recipe: Recipe, heads: int, width: int, layers: int
) -> tuple[Corpus, LMSpec]:
    """The text in tokens, and the model with MHA. Raises InputError, SpecError, OSError."""
    corpus = read_corpus(text, vocabulary, recipe.window)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_layers": layers}
    return corpus, LMSpec(vocab_size=corpus.vocab_size, num_heads=heads, num_kv_heads=heads, **sizes)


def corpus_line(corpus: Corpus) -> str:
    """What was read, for people."""
    unit = "bytes" if corpus.bytes_per_token == 1 else "tokens"
    return (
        f"{corpus.name}: {len(corpus.train):,} {unit} to train on, {len(corpus.held_out):,} held out"
        f" ({corpus.bytes_per_token:.2f} bytes each)"
    )
