"""lyra generate: text, with or without a context."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
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
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0, help="Above 0: draw tokens, the higher the freer.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the K most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Draw from the fewest tokens whose probabilities reach P.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw the same text each time.")] = None,
    lyra_kv: LyraKV = None,
    lyra_q: LyraQ = None,
    share_kv: ShareKV = False,
    split: SplitFile = None,
    live: LiveMode = None,
    positions: PositionMode = "continue",
    mode: ModeName = "parallel",
    gate: GateOption = None,
    override: Override = False,
    dtype: Dtype = "float32",
) -> None:
    """Continue a prompt, printing text as it comes."""
    loaded = load_model(model, backend, dtype, mode)
    asked = chosen_split(loaded.spec, lyra_kv, lyra_q, share_kv, split)
    if context is not None:
        loaded.attach(context, asked, live=live, positions=positions, gate=gate, override=override)
    for piece in loaded.stream(prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed):
        typer.echo(piece, nl=False)
    typer.echo()
