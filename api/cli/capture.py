"""lyra capture: a context from a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lyra.spec.storage import Storage

from .inspect import context_tables
from .options import BackendName, Dtype, JsonPath, ModelName, SplitFile, load_model, numbers, read_text
from .output import refuse_missing_folder, show


def capture(
    text: Annotated[str, typer.Argument(help="A UTF-8 text file, or - for standard input.")],
    output: Annotated[Path, typer.Argument(help="The context's file, for example book.safetensors.")],
    model: ModelName = None,
    backend: BackendName = "torch",
    layers: Annotated[str | None, typer.Option(help="Global layers to capture, such as 5,11; else all.")] = None,
    kv_heads: Annotated[str | None, typer.Option(help="KV heads to keep, such as 4-7; else all.")] = None,
    split: SplitFile = None,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens in one step; any number gives the same.")] = 512,
    dtype: Dtype = "float32",
    store: Annotated[Storage, typer.Option(help="What keys and values are stored as.")] = "float32",
    json_path: JsonPath = None,
) -> None:
    """Run a model over a text once and keep its keys and values as a context."""
    from lyra.progress import steps

    refuse_missing_folder(output, json_path)
    words = read_text(text)
    loaded = load_model(model, backend, dtype)
    with steps("Capturing") as move:
        context = loaded.capture(
            words,
            layers=None if layers is None else numbers(layers),
            kv_heads=None if kv_heads is None else numbers(kv_heads),
            split=split,
            chunk_size=chunk_size,
            on_progress=lambda done, total: move("tokens", done, total),
        )
    context = context.astype(store)
    context.save(output)
    show({"path": str(output)} | context.describe(), json_path, *context_tables(str(output), context))
