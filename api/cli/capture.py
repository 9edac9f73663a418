"""lyra capture: a context from a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lyra.spec.errors import InputError
from lyra.spec.storage import Storage

from .files import check_files
from .inspect import context_tables
from .options import (
    MOST_TOKENS,
    BackendName,
    Dtype,
    JsonPath,
    ModelName,
    SplitFile,
    counted_out,
    load_model,
    model_source,
    ranges,
    read_text,
    text_source,
)
from .output import show


def capture(
    text: Annotated[str, typer.Argument(help="A UTF-8 text file, or - for standard input.")],
    output: Annotated[Path, typer.Argument(help="The context's file, for example book.safetensors.")],
    model: ModelName = None,
    backend: BackendName = "torch",
    layers: Annotated[str | None, typer.Option(help="Global layers to capture, such as 5,11; else all.")] = None,
    kv_heads: Annotated[str | None, typer.Option(help="KV heads to keep, such as 4-7; else all.")] = None,
    split: SplitFile = None,
    chunk_size: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Tokens in one step; any number gives the same.")
    ] = 512,
    dtype: Dtype = "float32",
    store: Annotated[Storage, typer.Option(help="What keys and values are stored as.")] = "float32",
    json_path: JsonPath = None,
) -> None:
    """Run a model over a text once and keep its keys and values as a context."""
    from lyra.progress import steps

    check_files(json_path=json_path, contexts=(output,), inputs=(text_source(text), model_source(model), split))
    if split is not None and (layers, kv_heads) != (None, None):
        raise InputError("--split says which layers and KV heads are kept; leave out --layers and --kv-heads")
    requested = [None if words is None else ranges(words) for words in (layers, kv_heads)]
    if [] in requested:
        option = "--layers" if requested[0] == [] else "--kv-heads"
        raise InputError(f"{option} names none; leave it out for all of them")
    words = read_text(text)
    loaded = load_model(model, backend, dtype)
    known = ((loaded.spec.num_hidden_layers, "layers"), (loaded.spec.num_key_value_heads, "KV heads"))
    kept = [
        None if numbers is None else counted_out(numbers, *limit)
        for numbers, limit in zip(requested, known, strict=True)
    ]
    with steps("Capturing") as move:
        context = loaded.capture(
            words,
            layers=kept[0],
            kv_heads=kept[1],
            split=split,
            chunk_size=chunk_size,
            on_progress=lambda done, total: move("tokens", done, total),
        )
    context = context.astype(store)
    context.save(output)
    show({"path": str(output)} | context.describe(), json_path, *context_tables(str(output), context))
