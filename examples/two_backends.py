"""One context, two frameworks: capture a long document with one backend, save it, attach it in the other. Exit code 0
if both make the same of it: the same greedy tokens, and the same likelihood of what follows.

python examples/two_backends.py --from torch --to jax --tokens 1500
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import lyra
from lyra.cli.options import ModelName, load_model
from lyra.cli.output import fields_table, head_list
from lyra.progress import steps
from lyra.quantities import size

DOCUMENT = "types"
"""An entry of the language reference that comes with every Python: the hierarchy of its types."""

CONTINUATION = 128
"""Tokens after the captured ones, to be scored."""

PROMPT = "Python does not support single-precision floating point numbers; the"
"""A line of the document, some 900 tokens in, for the models to continue."""

GENERATED = 16
"""How many tokens are generated."""

AGREEMENT = 1e-3
"""How far apart the two frameworks' mean NLL may be, in nats."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Document:
    """Token ids of the part that is captured and of what follows it, and the text that follows the prompt."""

    captured: list[int]
    continuation: list[int]
    follows: str

    @classmethod
    def of(cls, model: lyra.Model, tokens: int) -> Document:
        """Cut the document with the model's tokenizer. Raises typer.BadParameter where it is too short."""
        assert model.text is not None
        before, found, after = topics[DOCUMENT].partition(PROMPT)
        ids, known = model.text.encode(topics[DOCUMENT]), len(model.text.encode(before + found)) + GENERATED
        if not found or not known <= tokens <= len(ids) - CONTINUATION:
            raise typer.BadParameter(f"expected {known} to {len(ids) - CONTINUATION} tokens, got {tokens}")
        follows = model.text.decode(model.text.encode(after[:1000])[1 : 1 + GENERATED])
        return cls(ids[:tokens], [ids[0], *ids[tokens : tokens + CONTINUATION]], follows)


@dataclass(frozen=True)
class Seen:
    """What a model made of the continuation and the prompt."""

    nll: float
    text: str
    first_token: float

    @classmethod
    def by(cls, model: lyra.Model, document: Document) -> Seen:
        """Continue the prompt greedily and score the continuation."""
        arrivals: list[float] = []
        started = time.perf_counter()
        text = model.generate(PROMPT, GENERATED, on_text=lambda _: arrivals.append(time.perf_counter() - started))
        return cls(model.score(document.continuation).mean_nll, text, arrivals[0] if arrivals else float("nan"))


def timed(call: Callable[[], Answer]) -> tuple[Answer, float]:
    """What a call returns, and the seconds it took."""
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def capture(model: lyra.Model, document: Document, split: str) -> lyra.StaticContext:
    """The context of the document, as far as the heads of a split read it, with progress."""
    with steps("Capturing") as move:
        return model.capture(
            document.captured, split=split, on_progress=lambda done, total: move("tokens", done, total)
        )


def lyra_heads(spec: lyra.ModelSpec) -> str:
    """The heads that read a context, layer by layer."""
    heads = {layer: spec.layer(layer).lyra_q_heads for layer in spec.global_layers}
    shown = "; ".join(f"{head_list(own)} of layer {layer}" for layer, own in heads.items() if own)
    count = sum(map(len, heads.values()))
    return f"{count} of {len(heads) * spec.num_attention_heads} in the global layers: {shown}"


def print_texts(console: Console, document: Document, texts: dict[str, str]) -> None:
    """The prompt and what each model made of it."""
    shown = Text()
    for name, text in {"the document": document.follows, **texts}.items():
        shown.append(f"{name}\n", style="bold")
        shown.append(PROMPT, style="dim")
        shown.append(text.rstrip() + "\n")
    console.print(Panel(shown, title=f"{GENERATED} greedy tokens after the grey ones", title_align="left"))


def main(
    source: Annotated[str, typer.Option("--from", help="The backend that captures.")] = "torch",
    target: Annotated[str, typer.Option("--to", help="The backend that attaches.")] = "jax",
    tokens: Annotated[int, typer.Option(help="Tokens of the document to capture.")] = 1500,
    split: Annotated[
        str, typer.Option(help="Which heads read the context: a preset, or a file that `lyra choose` wrote.")
    ] = "gemma-3-270m-lyra-2q",
    model: ModelName = "gemma-3-270m",
) -> None:
    """Capture a document with one backend, attach it in another, and show what it is worth there."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "document.safetensors"

        first = load_model(model, source, "float32")
        document = Document.of(first, tokens)
        context, capture_seconds = timed(partial(capture, first, document, split))
        context.save(path)
        first.attach(context, split)
        at_source = Seen.by(first, document)
        del first

        second = load_model(model, target, "float32")
        plain = Seen.by(second, document)
        loaded, load_seconds = timed(lambda: lyra.StaticContext.load(path))
        _, attach_seconds = timed(partial(second.attach, loaded, split))
        with_context = Seen.by(second, document)

        facts = {
            "document": f"pydoc_data.topics[{DOCUMENT!r}], {loaded.num_tokens:,} tokens",
            "Lyra heads": lyra_heads(second.spec),
            f"capture with {source}": f"{capture_seconds:.1f} s",
            "file": size(path.stat().st_size),
            f"load and attach in {target}": f"{load_seconds:.2f} s + {attach_seconds:.2f} s",
            f"first token in {target}": f"{plain.first_token:.1f} s without, {with_context.first_token:.1f} s with the "
            f"context (compiling included)",
        }
    console.print(fields_table(f"A context from {source} to {target}", facts))
    scores = Table(title=f"Mean NLL of the {CONTINUATION} tokens that follow (nats)", title_justify="left")
    for name in (f"{target}, no context", f"{target}, context of {source}", f"{source}, same context", "difference"):
        scores.add_column(name, justify="right")
    gap = abs(with_context.nll - at_source.nll)
    scores.add_row(f"{plain.nll:.4f}", f"{with_context.nll:.4f}", f"{at_source.nll:.4f}", f"{gap:.1e}")
    console.print(scores)
    texts = {f"{target}, no context": plain.text, f"{target}, context of {source}": with_context.text}
    print_texts(console, document, texts | {f"{source}, same context": at_source.text})
    same = with_context.text == at_source.text
    console.print(f"{source} and {target} generate {'the same text' if same else 'DIFFERENT texts'} with the context.")
    raise typer.Exit(0 if same and gap <= AGREEMENT else 1)


if __name__ == "__main__":
    typer.run(main)
