"""lyra gqa params and lyra gqa cache: what is counted from the spec."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lyra.quantities import size
from lyra.spec.attention import AttentionSpec, grouped
from lyra.spec.errors import SpecError
from lyra.spec.model import ModelSpec, presets
from lyra.spec.split import HeadSplit
from lyra.studies.cache import LENGTHS, calculate_kv_cache_size, context_size, full_cache_size, live_cache_size
from lyra.studies.figures import check_figure, save
from lyra.studies.gqa_figures import cache_figure, parameter_figure
from lyra.studies.parameters import groupings, kind, projections, reduction
from lyra.terminal import table_of

from ..files import check_files
from ..options import JsonPath
from ..output import show
from ..split import read_spec
from .group import MOST_HEADS, MOST_WIDTH, Cell, Plot, gqa

Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16 or int8.")]

SHAPES = {"MHA-32": 32, "GQA-8": 8, "GQA-4": 4, "MQA": 1}
"""The groupings of LLaMA-7B's shape (32 layers, 32 query heads of 128) that the cache is counted for."""

LAYERS, HEAD_DIM = 32, 128
LLAMA = "LLaMA-7B's layers and heads"

PARAMETERS: dict[str, Cell] = {
    "KV heads": lambda row: str(row["kv_heads"]),
    "q": lambda row: _count(row["q"]),
    "k": lambda row: _count(row["k"]),
    "v": lambda row: _count(row["v"]),
    "q+k+v": lambda row: _count(row["qkv"]),
    "less": lambda row: f"{row['reduction']:.0%}",
    "o": lambda row: _count(row["o"]),
}
PRESETS: dict[str, Cell] = {
    "": lambda row: row["name"],
    "Q / KV": lambda row: f"{row['heads']} / {row['kv_heads']}",
    "head_dim": lambda row: str(row["head_dim"]),
    "layers *": lambda row: f"{row['layers']}" + ("" if row["window"] is None else f" ({row['global_layers']})"),
    "less": lambda row: f"{row['reduction']:.0%}",
    "cache": lambda row: size(row["cache"]),
    "as MHA": lambda row: size(row["cache_as_mha"]),
}


@gqa.command()
def params(
    model: Annotated[str | None, typer.Argument(help="A preset, a .toml file, a model's folder or .gguf file.")] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, max=MOST_HEADS, help="Query heads, where no model is named.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, max=MOST_WIDTH, help="hidden_size, where no model is named.")
    ] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, max=MOST_WIDTH, help="Default: width / heads.")] = None,
    json_path: JsonPath = None,
    plot: Plot = None,
) -> None:
    """Parameters of a layer's projections for every legal number of KV heads, and what each saves against MHA."""
    check_figure(plot)
    check_files(plot, json_path=json_path, inputs=(model,))
    name, spec = _chosen_layer(model, heads, width, head_dim)
    rows = parameter_rows(spec)
    data = {"model": name, "hidden_size": spec.hidden_size, "head_dim": spec.head_dim, "rows": rows}
    title = f"{name}: parameters of one layer (width {spec.hidden_size}, head_dim {spec.head_dim})"
    if plot is not None:
        save(parameter_figure(title, rows), plot)
    its_own = spec.num_key_value_heads if model else None
    marked = {"": lambda row: f"{row['kind']} *" if row["kv_heads"] == its_own else row["kind"]}
    show(data, json_path, table_of(title, rows, marked | PARAMETERS, caption=f"* as {name} has it" if model else None))


@gqa.command()
def cache(
    model: Annotated[list[str] | None, typer.Argument(help="Presets, .toml files, folders or .gguf files.")] = None,
    dtype: Dtype = "float16",
    batch: Annotated[int, typer.Option(min=1, max=10**9, help="Rows.")] = 1,
    context: Annotated[bool, typer.Option("--context", help="Count a static context against the live cache.")] = False,
    every: Annotated[bool, typer.Option("--presets", help="Count the live cache of every preset.")] = False,
    json_path: JsonPath = None,
    plot: Plot = None,
) -> None:
    """Bytes of keys and values over 512 to 131,072 tokens, of the named models or of one shape in four groupings."""
    if every and (model or context):
        raise SpecError("--presets counts the live cache of every preset; name no model, and leave out --context")
    if context and not model:
        raise SpecError("--context would have no effect: it is counted for models; name one")
    check_figure(plot)
    check_files(plot, json_path=json_path, inputs=model or ())
    if every:
        series = {name: [live_cache_size(_model(name), at, batch, dtype) for at in LENGTHS] for name in presets()}
    else:
        series = cache_series([_model(source) for source in model or []], dtype, batch, context)
    rows = f", {batch} rows" if batch > 1 else ""
    named = ", ".join(Path(source).stem for source in model or ())
    title = f"{named or ('presets' if every else LLAMA)}: keys and values in {dtype}{rows}"
    if plot is not None:
        save(cache_figure(title, LENGTHS, series), plot)
    table = _cache_table(title, series, by_model=every)
    show({"dtype": dtype, "batch": batch, "tokens": LENGTHS, "bytes": series}, json_path, table)


@gqa.command("presets")
def preset_table(
    tokens: Annotated[int, typer.Option(min=1, max=10**12, help="Tokens that the cache is counted for.")] = 2048,
    dtype: Dtype = "float16",
    json_path: JsonPath = None,
) -> None:
    """Heads, savings and cache of every preset, one row each."""
    check_files(json_path=json_path)
    rows = [preset_row(ModelSpec.preset(name), tokens, dtype) for name in presets()]
    title = f"Presets: keys and values of {tokens:,} tokens in {dtype}"
    caption = "* (of them global); less: of the parameters of q+k+v than MHA would have"
    table = table_of(title, rows, PRESETS, caption=caption, overflow="fold")
    show({"tokens": tokens, "dtype": dtype, "rows": rows}, json_path, table)


def preset_row(spec: ModelSpec, tokens: int, dtype: str) -> dict[str, Any]:
    """What sharing KV heads saves one model: parameters of q+k+v, bytes of the live cache."""
    cached = live_cache_size(spec, tokens, dtype=dtype)
    return {
        "name": spec.name,
        "heads": spec.num_attention_heads,
        "kv_heads": spec.num_key_value_heads,
        "head_dim": spec.attention.head_dim,
        "layers": spec.num_hidden_layers,
        "global_layers": len(spec.global_layers),
        "window": spec.sliding.sliding_window if spec.sliding else None,
        "reduction": reduction(spec.attention),
        "cache": cached,
        "cache_as_mha": cached * spec.num_attention_heads // spec.num_key_value_heads,
    }


def parameter_rows(spec: AttentionSpec) -> list[dict[str, Any]]:
    """A row for every legal number of KV heads, MHA first."""
    rows = []
    for kv_heads in groupings(spec.num_attention_heads):
        layer = spec.replace(num_key_value_heads=kv_heads, split=None)
        of_kind = {"kind": kind(spec.num_attention_heads, kv_heads), "kv_heads": kv_heads}
        rows.append(of_kind | projections(layer) | {"reduction": reduction(layer)})
    return rows


def cache_series(models: list[ModelSpec], dtype: str, batch: int, context: bool) -> dict[str, list[int]]:
    """Bytes by length for every line: the four groupings of one shape, or each model's cache and context."""
    if not models:
        return {
            name: [calculate_kv_cache_size(LAYERS, heads, length, HEAD_DIM, batch, dtype) for length in LENGTHS]
            for name, heads in SHAPES.items()
        }
    series: dict[str, list[int]] = {}
    for spec in models:
        prefix = "" if len(models) == 1 else f"{spec.name}, "
        series[f"{prefix}live cache"] = [live_cache_size(spec, length, batch, dtype) for length in LENGTHS]
        if spec.sliding is not None:
            series[f"{prefix}without windows"] = [full_cache_size(spec, length, batch, dtype) for length in LENGTHS]
        if context:
            split = spec if spec.attention.split or spec.splits else spec.with_split(HeadSplit.half(spec))
            series[f"{prefix}as a context"] = [context_size(split, length, dtype) for length in LENGTHS]
    return series


def _chosen_layer(
    model: str | None, heads: int | None, width: int | None, head_dim: int | None
) -> tuple[str, AttentionSpec]:
    """The layer to count, and its name. Raises SpecError where neither a model nor both sizes are given."""
    if model is not None:
        if (heads, width, head_dim) != (None, None, None):
            raise SpecError(f"{model} has its sizes; leave out --heads, --width and --head-dim")
        spec = read_spec(model)
        return (spec.name, spec.attention) if isinstance(spec, ModelSpec) else (Path(model).stem, spec)
    if heads is None or width is None:
        raise SpecError("name a model, or give --heads and --width")
    return f"{heads} query heads", grouped(width, heads, head_dim=head_dim)


def _cache_table(title: str, series: dict[str, list[int]], by_model: bool) -> Table:
    """A row for each length; or, of many models, a row for each and every other length."""
    if by_model:
        places = range(0, len(LENGTHS), 2)
        rows = [
            {"tokens": name} | {f"{LENGTHS[at]:,}": size(values[at]) for at in places}
            for name, values in series.items()
        ]
        return table_of(title, rows, {name: itemgetter(name) for name in rows[0]}, overflow="fold")
    rows = [
        {"tokens": f"{length:,}"} | {name: size(values[at]) for name, values in series.items()}
        for at, length in enumerate(LENGTHS)
    ]
    return table_of(title, rows, {name: itemgetter(name) for name in rows[0]}, left=0)


def _model(source: str) -> ModelSpec:
    spec = read_spec(source)
    if not isinstance(spec, ModelSpec):
        raise SpecError(f"{source} describes one layer; name a model, whose layers are counted")
    return spec


def _count(parameters: int) -> str:
    """Parameters for people: exact below a million."""
    return f"{parameters:,}" if parameters < 1_000_000 else f"{parameters / 1e6:,.1f} M"
