"""lyra generate: text, with or without a context."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
    BackendName,
    ContextPath,
    Dtype,
    LiveMode,
    LyraKV,
    LyraQ,
    ModelName,
    Override,
    PositionMode,
    ShareKV,
    chosen_split,
    load_model,
)


def generate(
    prompt: Annotated[str, typer.Argument(help="What the text starts with.")],
    context: ContextPath = None,
    model: ModelName = None,
    backend: BackendName = "torch",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=0, help="At most this many tokens.")
    ] = 64,
    lyra_kv: LyraKV = None,
    lyra_q: LyraQ = None,
    share_kv: ShareKV = False,
    live: LiveMode = "causal",
    positions: PositionMode = "continue",
    override: Override = False,
    dtype: Dtype = "float32",
) -> None:
    """Continue a prompt, printing text as it comes."""
    loaded = load_model(model, backend, dtype)
    split = chosen_split(loaded.spec, lyra_kv, lyra_q, share_kv)
    if context is not None:
        loaded.attach(context, split, live=live, positions=positions, override=override)
    for piece in loaded.stream(prompt, max_new_tokens):
        typer.echo(piece, nl=False)
    typer.echo()
