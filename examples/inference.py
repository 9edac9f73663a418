"""One prompt four ways: the plain model, a document in front of the prompt, and the document as a static context in
both modes of Lyra. Text, likelihood, time to the first token and memory, side by side.

python examples/inference.py --tokens 600 --heads 4 --gate 0.25
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import DynamicCache

import lyra
from lyra.cli.options import ModelName, load_model
from lyra.quantities import size

DOCUMENT = "try"
"""An entry of the language reference that comes with every Python: the try statement."""

PROMPT = "Additional information on exceptions"
"""The start of a sentence in the document, some 160 tokens in, for the models to continue."""

SCORED = 32
"""Tokens of the document after the prompt whose likelihood is measured."""

GENERATED = 16
"""How many tokens are generated."""


@dataclass(frozen=True)
class Task:
    """Token ids: the document (BOS first), the prompt and what follows it there (both without BOS)."""

    document: list[int]
    prompt: list[int]
    follows: list[int]

    @classmethod
    def of(cls, model: lyra.Model, tokens: int) -> Task:
        """Cut the document with the model's tokenizer. Raises typer.BadParameter where it is too short."""
        assert model.text is not None
        before, found, after = topics[DOCUMENT].partition(PROMPT)
        ids, known = model.text.encode(topics[DOCUMENT]), len(model.text.encode(before + found)) + SCORED
        if not found or not known <= tokens <= len(ids):
            raise typer.BadParameter(f"expected {known} to {len(ids)} tokens, got {tokens}")
        return cls(ids[:tokens], model.text.encode(PROMPT)[1:], model.text.encode(after[:1000])[1 : 1 + SCORED])


@dataclass(frozen=True)
class Seen:
    """What one way makes of the prompt. nll in nats per token of what follows it; seconds; bytes of keys and values."""

    text: str
    nll: float
    first_token: float
    held: int

    @classmethod
    def by(cls, model: lyra.Model, before: list[int], task: Task) -> Seen:
        """Continue, time, weigh and score the prompt behind the ids `before`."""
        assert model.text is not None
        prompt = [*before, *task.prompt]
        made, first_token, held = continued(model, prompt)
        nll = model.score([*prompt, *task.follows]).nll[-len(task.follows) :]
        return cls(model.text.decode(np.asarray(made)), float(nll.mean()), first_token, held)


@torch.inference_mode()
def continued(model: lyra.Model, prompt: list[int]) -> tuple[list[int], float, int]:
    """The greedy tokens after a prompt, the seconds to the first of them, and the bytes of keys and values held then.

    Held are the live cache and the context, which is there before the clock starts.
    """
    cache, made, feed = DynamicCache(config=model.module.config), [], prompt
    started = time.perf_counter()
    first_token, held = 0.0, 0
    for _ in range(GENERATED):
        logits = model.module(torch.tensor([feed]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        feed = [int(logits[0, -1].argmax())]
        if not made:
            first_token = time.perf_counter() - started
            held = sum(tensor.nbytes for tensor in (*cache_tensors(cache), *context_tensors(model)))
        made += feed
    return made, first_token, held


def cache_tensors(cache: DynamicCache) -> Iterator[torch.Tensor]:
    """The live keys and values of every layer."""
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def context_tensors(model: lyra.Model) -> Iterator[torch.Tensor]:
    """The static keys and values that are attached."""
    return (buffer for name, buffer in model.module.named_buffers() if name.endswith((".static_k", ".static_v")))


def ways(name: str | None, first: lyra.Model, task: Task, heads: int, gate: float) -> Iterator[tuple[str, Seen]]:
    """Each way by name, one after the other; the second model is loaded when the first has done its part."""
    bos = task.document[:1]
    continued(first, [*bos, *task.prompt])  # what is slow the first time only is nobody's time
    yield "plain", Seen.by(first, bos, task)
    yield "full prompt", Seen.by(first, task.document, task)
    context = first.capture(task.document)
    first.attach(context, lyra.HeadSplit.last_q(first.spec, heads))
    yield f"Lyra, parallel, {heads} heads", Seen.by(first, bos, task)
    first.detach()
    second = lyra.load(name, mode="sequential")
    second.attach(context, gate=gate)
    yield f"Lyra, sequential, gate {gate:g}", Seen.by(second, bos, task)


def print_all(console: Console, task: Task, seen: dict[str, Seen], follows: str) -> None:
    """The figures as a table, and the texts."""
    table = Table(
        title=f"{len(task.document):,} tokens of context, a prompt of {len(task.prompt)}", title_justify="left"
    )
    table.add_column("way", style="bold")
    for column in ("mean NLL", "first token", "keys and values"):
        table.add_column(column, justify="right")
    for name, way in seen.items():
        table.add_row(name, f"{way.nll:.3f}", f"{way.first_token:.2f} s", size(way.held))
    console.print(table)
    shown = Text()
    for name, text in {"the document": follows, **{name: way.text for name, way in seen.items()}}.items():
        shown.append(f"{name}\n", style="bold")
        shown.append(PROMPT, style="dim")
        shown.append(text.rstrip() + "\n")
    console.print(Panel(shown, title=f"{GENERATED} greedy tokens after the grey ones", title_align="left"))


def main(
    tokens: Annotated[int, typer.Option(help="Tokens of the document to capture.")] = 600,
    heads: Annotated[int, typer.Option(help="How many query heads of each global layer read the context.")] = 4,
    gate: Annotated[float, typer.Option(help="How far the injected blocks' gates are open.")] = 0.25,
    model: ModelName = None,
) -> None:
    """Compare the plain model, the document as a prompt, and the document as a context in both modes."""
    first = load_model(model, "torch", "float32")
    task = Task.of(first, tokens)
    assert first.text is not None
    seen = dict(ways(model, first, task, heads, gate))
    print_all(Console(), task, seen, first.text.decode(task.follows[:GENERATED]))


if __name__ == "__main__":
    typer.run(main)
