"""Tune a static context: train its keys and values with torch until they hold a longer text than they were captured
from. The model's own parameters stay as they are. Exit code 0 if the loss falls.

python examples/tune_context.py --steps 12 --out tuned.safetensors
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

import lyra
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.cli.options import ModelName, load_model
from lyra.progress import steps as progress

DOCUMENT = "types"
"""An entry of the language reference that comes with every Python."""


def losses(module: PreTrainedModel, ids: torch.Tensor, steps: int, rate: float) -> Iterator[float]:
    """Before each step of Adam, and after the last, the loss of ids [1,T] in nats a token."""
    optimizer = torch.optim.Adam([part for part in module.parameters() if part.requires_grad], lr=rate)
    for number in range(steps + 1):
        loss = module(input_ids=ids, labels=ids).loss
        yield loss.item()
        if number < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


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
    loaded = load_model(model, "torch", "float32")
    assert loaded.text is not None
    ids = torch.tensor([loaded.text.encode(topics[DOCUMENT])[:tokens]])
    split = lyra.HeadSplit.last_q(loaded.spec, loaded.spec.num_attention_heads - 1)
    captured = loaded.capture(ids[0, :slots].numpy())
    loaded.module.requires_grad_(False)  # before the context's own parameters join them
    injector = GemmaInjector(loaded.module).enable(captured, split, trainable=True)
    table = Table("step", "loss (nats a token)", "seconds", title=f"{slots} slots learn {tokens} tokens")
    started, found = time.perf_counter(), []
    with progress("Tuning") as move:
        for loss in losses(loaded.module, ids, steps, rate):
            table.add_row(str(len(found)), f"{loss:.4f}", f"{time.perf_counter() - started:.1f}")
            move(f"loss {loss:.4f}", len(found), steps)
            found.append(loss)
    tuned = injector.context()
    injector.disable()
    loaded.attach(tuned, split)
    console = Console()
    console.print(table)
    console.print(f"attached, the tuned context gives {loaded.score(ids[0].numpy()).mean_nll:.4f} nats a token")
    if out is not None:
        tuned.save(out)
        console.print(f"saved to {out}")
    raise typer.Exit(0 if found[-1] < found[0] else 1)


if __name__ == "__main__":
    typer.run(main)
