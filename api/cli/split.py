"""lyra split: what a head split means for a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from lyra.checkpoint import check_folder
from lyra.quantities import size
from lyra.spec.attaching import Split, read_split
from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError, SpecError
from lyra.spec.model import ModelSpec, load_spec, presets
from lyra.spec.split import HeadSplit
from lyra.terminal import new_table

from .files import check_files
from .headmap import save_head_map
from .options import JsonPath, LyraKV, LyraQ, ShareKV, SplitFile, chosen_split
from .output import head_list, show
from .splits_by_layer import explain_by_layer, layers_map, layers_note, layers_table, save_layers_map

FLOAT32 = 4
TOKENS = 1000
GROUPS_PER_LINE = 8
STREAMS = ("lyra", "vanilla")


def split(
    model: Annotated[str, typer.Argument(help="A preset, a .toml file, a model's folder or a .gguf file.")],
    lyra_kv: LyraKV = None,
    lyra_q: LyraQ = None,
    share_kv: ShareKV = False,
    file: SplitFile = None,
    json_path: JsonPath = None,
    svg: Annotated[Path | None, typer.Option(metavar="PATH.svg", help="Draw the head map as SVG.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="PATH.png", help="Draw the head map as PNG.")] = None,
) -> None:
    """Explain a head split: heads of each stream, groups, parameters, cache; or why it is illegal."""
    pictures = [_picture(path, kind) for path, kind in ((svg, "svg"), (png, "png")) if path is not None]
    check_files(*pictures, json_path=json_path, inputs=(model, file))
    spec = read_spec(model)
    attention = spec.attention if isinstance(spec, ModelSpec) else spec
    requested: Split | str | None = chosen_split(attention, lyra_kv, lyra_q, share_kv, file)
    if isinstance(spec, ModelSpec):
        requested = read_split(spec, requested)
        if requested is None and spec.splits:
            requested = {item.layer: item.split for item in spec.splits}
        if isinstance(requested, Mapping):
            _show_layers(spec.with_split(requested), pictures, json_path)
            return
    if isinstance(requested, str):
        raise SpecError(f"{model} describes one layer; --split goes with a model")
    attention = attention.replace(split=requested or attention.split or HeadSplit.half(attention))
    layers = len(spec.global_layers) if isinstance(spec, ModelSpec) else 1
    data = {"model": spec.name if isinstance(spec, ModelSpec) else model} | explain(attention, layers)
    if pictures:
        save_head_map(pictures, Path(data["model"]).name, attention, spec if isinstance(spec, ModelSpec) else None)
    show(data, json_path, _table(data), _head_map(attention), _notes(data))


def _show_layers(spec: ModelSpec, pictures: list[Path], json_path: Path | None) -> None:
    """The same for a model whose layers have different splits."""
    data = explain_by_layer(spec)
    if pictures:
        save_layers_map(pictures, spec)
    show(data, json_path, layers_table(data), layers_map(spec), layers_note(data))


def _picture(path: Path, kind: str) -> Path:
    """The path of a picture, once its ending is right. Raises InputError."""
    if path.suffix != f".{kind}":
        raise InputError(f"--{kind} {str(path)!r}: the name must end in .{kind}")
    return path


def read_spec(source: str) -> ModelSpec | AttentionSpec:
    """The spec of a preset, a .toml file, a model's folder or a .gguf file. Raises SpecError, CheckpointError."""
    known = f"presets: {', '.join(presets())}"
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir() and source != "", path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, a home of nobody
        raise SpecError(f"{source!r:.200} is no path ({error!s:.200}) and no preset; {known}") from None
    if is_folder:
        config = json.loads((check_folder(path) / "config.json").read_text(encoding="utf-8"))
        return ModelSpec.from_hf_config(config, name=path.name)
    if path.suffix == ".gguf" and is_file:
        from lyra.gguf_convert import hf_config
        from lyra.gguf_parts import GGUFModel

        return ModelSpec.from_hf_config(hf_config(GGUFModel(path)))
    if path.suffix == ".toml" or source in presets():
        return load_spec(source)
    raise SpecError(f"{source!r:.200} is no folder, no .gguf and no .toml file, and no preset; {known}")


def explain(attention: AttentionSpec, layers: int) -> dict[str, Any]:
    """A split as plain data. Parameters and bytes are those of all `layers` global layers, float32."""
    split = attention.split
    assert split is not None
    heads = {
        "lyra": (split.lyra_q_heads, split.lyra_kv_heads),
        "vanilla": (split.vanilla_q_heads, split.vanilla_kv_heads),
    }
    per_head = attention.head_dim * attention.hidden_size * layers
    per_token = 2 * attention.head_dim * FLOAT32 * layers
    return {
        "global_layers": layers,
        "group_size": attention.group_size,
        "head_dim": attention.head_dim,
        "streams": {
            name: {
                "q_heads": list(query),
                "kv_heads": list(key_value),
                "q_and_o_parameters": 2 * len(query) * per_head,
                "k_and_v_parameters": 2 * len(key_value) * per_head,
                "static_cache_bytes_per_1000_tokens": TOKENS * per_token * len(key_value) if name == "lyra" else 0,
            }
            for name, (query, key_value) in heads.items()
        },
        "live_cache_bytes_per_1000_tokens": TOKENS * per_token * attention.num_key_value_heads,
        "cut_kv_heads": list(split.cut_kv_heads),
        "kv_aligned": split.is_kv_aligned,
    }


def _table(data: dict[str, Any]) -> Table:
    table = new_table(f"{data['model']}: {data['global_layers']} global layers")
    table.add_column("stream", style="bold")
    columns = ("query heads", "KV heads", "q, o weights", "k, v weights", "context / 1k tokens")
    for column in columns:
        table.add_column(column, justify="right")
    for name in STREAMS:
        row = data["streams"][name]
        table.add_row(
            name,
            f"{len(row['q_heads'])}: {head_list(row['q_heads'])}",
            f"{len(row['kv_heads'])}: {head_list(row['kv_heads'])}",
            f"{row['q_and_o_parameters'] / 1e6:,.1f} M",
            f"{row['k_and_v_parameters'] / 1e6:,.1f} M",
            size(row["static_cache_bytes_per_1000_tokens"]),
        )
    return table


def _head_map(attention: AttentionSpec) -> Text:
    """Every KV head over the query heads that read it; L marks a Lyra head, v a vanilla one."""
    lyra, group = set(attention.lyra_q_heads), attention.group_size
    wide = len(str(attention.num_attention_heads - 1))
    cell = group * (wide + 1) - 1
    cell = max(cell, len(str(attention.num_key_value_heads - 1)))
    text = Text("\n")
    for start in range(0, attention.num_key_value_heads, GROUPS_PER_LINE):
        shown = range(start, min(start + GROUPS_PER_LINE, attention.num_key_value_heads))
        queries = [range(kv * group, (kv + 1) * group) for kv in shown]
        text.append("KV head  " + " │ ".join(f"{kv:^{cell}}" for kv in shown) + "\n", style="bold")
        text.append(
            "queries  " + " │ ".join(" ".join(f"{q:>{wide}}" for q in row).ljust(cell) for row in queries) + "\n"
        )
        text.append("stream   ")
        for index, row in enumerate(queries):
            text.append(" │ " if index else "")
            for place, query in enumerate(row):
                text.append(" " if place else "")
                marked = query in lyra
                text.append(f"{'L' if marked else 'v':>{wide}}", style="bold green" if marked else "dim")
            text.append(" " * (cell - (group * (wide + 1) - 1)))
        text.append("\n")
    return text


def _notes(data: dict[str, Any]) -> Text:
    live = size(data["live_cache_bytes_per_1000_tokens"])
    text = Text(f"Live cache: {live} per 1,000 tokens and row. Everything in float32, over all global layers.\n")
    if data["cut_kv_heads"]:
        text.append(f"KV heads {head_list(data['cut_kv_heads'])} serve both streams: counted in each.\n")
    return text
