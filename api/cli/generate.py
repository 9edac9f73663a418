"""lyra generate: text, with or without a context."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lyra.terminal import paragraphs

from .options import (
    MOST_TOKENS,
    BackendName,
    ContextPath,
    Dtype,
    GateOption,
    LiveMode,
    LyraKV,
    LyraQ,
    ModelName,
    ModeName,
    Override,
    PositionMode,
    ShareKV,
    SplitFile,
    check_attaching,
    check_split_options,
    chosen_split,
    finite,
    load_model,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="What the text starts with.")],
    context: ContextPath = None,
    model: ModelName = None,
    backend: BackendName = "torch",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=0, max=MOST_TOKENS, help="At most this many tokens.")
    ] = 64,
    temperature: Annotated[
        float,
        typer.Option("--temperature", "-t", min=0, callback=finite, help="Above 0: draw tokens, the higher the freer."),
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(min=1, max=MOST_TOKENS, help="Draw from the K most probable tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, callback=finite, help="Draw from the fewest tokens whose probabilities reach P."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Draw the same text each time.")] = None,
    lyra_kv: LyraKV = None,
    lyra_q: LyraQ = None,
    share_kv: ShareKV = False,
    split: SplitFile = None,
    live: LiveMode = None,
    positions: PositionMode = None,
    mode: ModeName = "parallel",
    gate: GateOption = None,
    override: Override = False,
    dtype: Dtype = "float32",
) -> None:
    """Continue a prompt, printing text as it comes."""
    check_split_options(lyra_kv, lyra_q, share_kv, split)
    asks_for = {"lyra-kv": lyra_kv, "lyra-q": lyra_q, "split": split, "live": live, "positions": positions}
    check_attaching(context, mode, gate, asks_for | {"override": override})
    loaded = load_model(model, backend, dtype, mode)
    requested = chosen_split(loaded.spec, lyra_kv, lyra_q, share_kv, split)
    if context is not None:
        loaded.attach(context, requested, live=live, positions=positions or "continue", gate=gate, override=override)
    # What a model writes may move the cursor; a file gets it as it is.
    shown = sys.stdout is not None and sys.stdout.isatty()
    for piece in loaded.stream(prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed):
        typer.echo(paragraphs(piece) if shown else piece, nl=False)
    typer.echo()
