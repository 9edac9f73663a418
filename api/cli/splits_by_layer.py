"""A model whose layers have different splits: every layer in a line, as data, as text and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lyra.backends.protocol import import_extra
from lyra.quantities import size
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit
from lyra.studies.cache import context_size
from lyra.studies.figures import save
from lyra.terminal import new_table

from .headmap import CELL, DIM, EDGE, GAP, INK, LYRA, PAPER, ROW, VANILLA, draw_box
from .output import head_list

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS = 1000
LEFT, TOP, SMALLEST = 0.9, 1.15, 5.2
"""Inches left of the heads, above them, and the least width."""


def explain_by_layer(spec: ModelSpec) -> dict[str, Any]:
    """The split of every global layer as plain data; bytes are those of float32 keys and values."""
    none = HeadSplit.none().bind(spec)
    splits = {layer: spec.layer(layer).split or none for layer in spec.global_layers}
    return {
        "model": spec.name,
        "global_layers": len(splits),
        "group_size": spec.attention.group_size,
        "head_dim": spec.attention.head_dim,
        "layers": [
            {
                "layer": layer,
                "lyra_q_heads": list(split.lyra_q_heads),
                "lyra_kv_heads": list(split.lyra_kv_heads),
                "cut_kv_heads": list(split.cut_kv_heads),
            }
            for layer, split in splits.items()
        ],
        "lyra_q_heads": sum(len(split.lyra_q_heads) for split in splits.values()),
        "q_heads": spec.num_attention_heads * len(splits),
        "static_cache_bytes_per_1000_tokens": context_size(spec, TOKENS, "float32"),
        "kv_aligned": all(split.is_kv_aligned for split in splits.values()),
    }


def layers_table(data: dict[str, Any]) -> Table:
    """A line for each layer."""
    title = f"{data['model']}: {data['lyra_q_heads']} of {data['q_heads']} query heads go to Lyra"
    table = new_table(title)
    for column in ("layer", "Lyra query heads", "KV heads they read", "of these shared"):
        table.add_column(column, justify="right")
    for row in data["layers"]:
        heads = (head_list(row[name]) for name in ("lyra_q_heads", "lyra_kv_heads", "cut_kv_heads"))
        table.add_row(str(row["layer"]), *heads)
    return table


def layers_map(spec: ModelSpec) -> Text:
    """Every layer over its query heads, group by group; L marks a Lyra head, v a vanilla one."""
    wide, group = len(str(spec.num_attention_heads - 1)), spec.attention.group_size
    text = Text("\nqueries  ", style="bold")
    for query in range(spec.num_attention_heads):
        text.append(f"{_before(query, group)}{query:>{wide}}")
    for layer in spec.global_layers:
        lyra = spec.layer(layer).lyra_q_heads
        text.append(f"\nlayer {layer:<3}", style="not bold")
        for query in range(spec.num_attention_heads):
            text.append(_before(query, group), style="not bold")
            text.append(
                f"{'L' if query in lyra else 'v':>{wide}}", style="bold green" if query in lyra else "not bold dim"
            )
    return text.append("\n")


def layers_note(data: dict[str, Any]) -> Text:
    """What a context takes."""
    static = size(data["static_cache_bytes_per_1000_tokens"])
    return Text(f"A context takes {static} per 1,000 tokens: float32, the KV heads in use only.\n")


def save_layers_map(paths: Sequence[Path], spec: ModelSpec) -> None:
    """Draw the splits of all layers into files; their endings say the formats. Raises ImportError for matplotlib."""
    import_extra("matplotlib", "studies")
    import matplotlib as mpl

    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure = draw_layers(spec)
        for path in paths:
            save(figure, path)


def draw_layers(spec: ModelSpec) -> Figure:
    """A line of boxes for each global layer, one unit of the axes being an inch; groups stand a little apart."""
    from matplotlib.figure import Figure

    data, group = explain_by_layer(spec), spec.attention.group_size
    width = max(SMALLEST, LEFT + spec.num_attention_heads * CELL + spec.num_key_value_heads * GAP + EDGE)
    height = TOP + len(data["layers"]) * ROW + 0.75
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(EDGE, EDGE + 0.1, spec.name, va="center", fontsize=13, weight="bold", color=INK)
    told = f"{data['lyra_q_heads']} of {data['q_heads']} query heads go to Lyra; {group} of them read a KV head"
    axes.text(EDGE, EDGE + 0.42, told, va="center", fontsize=9.5, color=DIM)
    for line, row in enumerate(data["layers"]):
        y = TOP + line * ROW
        axes.text(
            LEFT - 0.12, y + ROW / 2 - 0.02, f"layer {row['layer']}", ha="right", va="center", fontsize=9, color=DIM
        )
        for query in range(spec.num_attention_heads):
            x = LEFT + query * CELL + query // group * GAP
            colours = LYRA if query in row["lyra_q_heads"] else VANILLA
            draw_box(axes, x + 0.02, y, CELL - 0.04, ROW - 0.05, colours, str(query))
    y = height - 0.5
    for place, (colours, words) in enumerate(((LYRA, "Lyra"), (VANILLA, "vanilla"))):
        x = LEFT + place * 1.6
        draw_box(axes, x, y, CELL, 0.2, colours, "")
        axes.text(x + CELL + 0.12, y + 0.1, words, va="center", fontsize=9.5, color=INK)
    return figure


def _before(query: int, group: int) -> str:
    """What stands between a query head and the one before it."""
    return "" if query == 0 else " │ " if query % group == 0 else " "
