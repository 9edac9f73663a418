"""Tune a static context: train its keys and values with optax until they hold a longer text than they were captured
from. The model's own parameters stay as they are. Exit code 0 if the loss falls.

python examples/tune_context_jax.py --steps 12 --out tuned.safetensors
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import jax
import numpy as np
import optax
import typer
from rich.console import Console
from rich.table import Table

import lyra
from lyra.backends.jax_impl import tuning
from lyra.backends.jax_impl.forward import split_module
from lyra.cli.options import ModelName, load_model
from lyra.progress import steps as progress

DOCUMENT = "types"
"""An entry of the language reference that comes with every Python."""


def tuned(
    model: lyra.Model, context: tuning.Context, settings: tuning.Settings, ids: np.ndarray, steps: int, rate: float
) -> Iterator[tuple[float, tuning.Context]]:
    """Before each step of Adam, and after the last, the loss of ids [1,T] in nats a token and the context."""
    optimizer = optax.adam(rate)
    state, graph = optimizer.init(context), split_module(model.module)

    @jax.jit
    def step(
        context: tuning.Context, state: optax.OptState, gradient: tuning.Context
    ) -> tuple[tuning.Context, optax.OptState]:
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(context, updates), state

    for number in range(steps + 1):
        loss, gradient = tuning.loss_and_gradient(graph, ids, None, context, settings)
        yield float(loss), context
        if number < steps:
            context, state = step(context, state, gradient)


def main(
    model: ModelName = None,
    tokens: Annotated[int, typer.Option(min=3, help="Tokens of the text that the context is trained to hold.")] = 128,
    slots: Annotated[
        int, typer.Option(min=1, help="Slots of the context, captured from the text's first tokens.")
    ] = 32,
    steps: Annotated[int, typer.Option(min=1, help="Steps of Adam.")] = 12,
    rate: Annotated[float, typer.Option(help="Its learning rate.")] = 0.05,
    out: Annotated[Path | None, typer.Option(help="Where to save the tuned context.")] = None,
) -> None:
    """Train the keys and values of a short context and show the loss falling."""
    loaded = load_model(model, "jax", "float32")
    assert loaded.text is not None
    ids = np.array([loaded.text.encode(topics[DOCUMENT])[:tokens]])
    split = lyra.HeadSplit.last_q(loaded.spec, loaded.spec.num_attention_heads - 1)
    captured = loaded.capture(ids[0, :slots])
    splits = dict.fromkeys(captured.layers, split)
    static = {layer: captured.static_layer(layer, split.lyra_kv_heads) for layer in splits}
    context, settings = tuning.tunable(loaded.spec, static, splits)
    table = Table("step", "loss (nats a token)", "seconds", title=f"{slots} slots learn {tokens} tokens")
    started, losses = time.perf_counter(), []
    with progress("Tuning") as move:
        for loss, found in tuned(loaded, context, settings, ids, steps, rate):
            table.add_row(str(len(losses)), f"{loss:.4f}", f"{time.perf_counter() - started:.1f}")
            move(f"loss {loss:.4f}", len(losses), steps)
            losses.append(loss)
            made = tuning.tuned_context(captured, found, splits)
    loaded.attach(made, split)
    console = Console()
    console.print(table)
    console.print(f"attached, the tuned context gives {loaded.score(ids[0]).mean_nll:.4f} nats a token")
    if out is not None:
        made.save(out)
        console.print(f"saved to {out}")
    raise typer.Exit(0 if losses[-1] < losses[0] else 1)


if __name__ == "__main__":
    typer.run(main)
