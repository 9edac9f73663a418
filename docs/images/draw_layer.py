"""Draws docs/images/layer.svg: which heads of a Gemma-3 12B global layer see what.

python docs/images/draw_layer.py [PATH]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from lyra.spec import AttentionSpec, HeadSplit, ModelSpec

INK, PALE = "#1f2933", "#7b8794"
VANILLA, LYRA = ("#dbe7f5", "#2b5c8a"), ("#d8f0df", "#1e7a3e")
PITCH, LEFT = 0.56, 1.75
HEADS_Y, KV_Y, LIVE_Y, STATIC_Y = 3.35, 2.72, 1.55, 0.55


def box(axes: Axes, x: float, y: float, width: float, height: float, colours: tuple[str, str], text: str = "") -> None:
    """A rounded box with text in its middle."""
    fill, edge = colours
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=edge, fontsize=10)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """An arrow from start to end."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.6, "mutation_scale": 14})


def left_of(head: int, group: int) -> float:
    """Where a query head's box starts; groups stand a little apart."""
    return LEFT + head * PITCH + (head // group) * 0.12


def draw_heads(axes: Axes, spec: AttentionSpec) -> None:
    """Query heads, and under every group the KV head that it reads."""
    for head in range(spec.num_attention_heads):
        colours = LYRA if head in spec.lyra_q_heads else VANILLA
        box(axes, left_of(head, spec.group_size), HEADS_Y, PITCH - 0.06, 0.5, colours, str(head))
    for kv_head in range(spec.num_key_value_heads):
        first = kv_head * spec.group_size
        colours = LYRA if kv_head in spec.lyra_kv_heads else VANILLA
        width = PITCH * spec.group_size - 0.06
        box(axes, left_of(first, spec.group_size), KV_Y, width, 0.42, colours, f"KV {kv_head}")
    for y, name in ((HEADS_Y + 0.25, "query heads"), (KV_Y + 0.21, "KV heads")):
        axes.text(LEFT - 0.2, y, name, ha="right", va="center", color=INK, fontsize=10)


def draw_sources(axes: Axes, spec: AttentionSpec) -> None:
    """The live cache under all heads, the static context under the Lyra heads only."""
    group, last = spec.group_size, spec.num_attention_heads - 1
    right, lyra_left = left_of(last, group) + PITCH - 0.06, left_of(spec.lyra_q_heads[0], group)
    box(axes, LEFT, LIVE_Y, right - LEFT, 0.55, ("#f0f2f5", PALE), "")
    live = "live cache: the tokens so far; grows, causal, every head"
    axes.text((LEFT + lyra_left) / 2 + 0.15, LIVE_Y + 0.275, live, ha="center", va="center", color=INK, fontsize=9)
    box(axes, lyra_left, STATIC_Y, right - lyra_left, 0.55, LYRA, "static context: captured once, seen whole")
    quarter = (lyra_left - LEFT) / 2
    arrow(axes, (LEFT + quarter, LIVE_Y + 0.57), (LEFT + quarter, KV_Y - 0.04), VANILLA[1])
    middle = (lyra_left + right) / 2
    arrow(axes, (middle - 0.9, LIVE_Y + 0.57), (middle - 0.9, KV_Y - 0.04), LYRA[1])
    arrow(axes, (middle + 0.9, STATIC_Y + 0.57), (middle + 0.9, KV_Y - 0.04), LYRA[1])
    axes.text(middle, KV_Y - 0.32, "one softmax", ha="center", va="center", color=LYRA[1], fontsize=9, style="italic")
    axes.text(LEFT - 0.2, (LIVE_Y + STATIC_Y + 0.55) / 2, "keys and\nvalues", ha="right", va="center", color=INK)


def draw_stages(axes: Axes, spec: AttentionSpec) -> None:
    """The stages of the layer in their order; all but one are those of Gemma-3."""
    right = left_of(spec.num_attention_heads - 1, spec.group_size) + PITCH - 0.06
    gap = 0.35
    step = (right - LEFT + gap) / len(spec.order)
    for index, stage in enumerate(spec.order):
        x = LEFT + index * step
        box(axes, x, 4.75, step - gap, 0.5, LYRA if stage == "attend" else ("#ffffff", PALE), stage)
        if index:
            arrow(axes, (x - gap, 5.0), (x + 0.02, 5.0), PALE)
        if stage == "attend":
            centre = x + (step - gap) / 2
            axes.plot([centre, centre], [4.73, 4.4], color=LYRA[1], lw=1.2, ls=":")
    axes.text(LEFT - 0.2, 5.0, "stages", ha="right", va="center", color=INK, fontsize=10)
    split, names = spec.split, ("vanilla heads", "Lyra heads")
    assert split is not None
    for heads, name, colours in zip((split.vanilla_q_heads, split.lyra_q_heads), names, (VANILLA, LYRA), strict=True):
        middle = (left_of(heads[0], spec.group_size) + left_of(heads[-1], spec.group_size) + PITCH) / 2
        axes.text(middle, 4.12, name, ha="center", va="center", color=colours[1], fontsize=11, weight="bold")


def draw(path: Path) -> None:
    """Write the picture."""
    mpl.rcParams |= {"svg.hashsalt": "lyra", "font.family": "DejaVu Sans"}
    spec = ModelSpec.preset("gemma-3-12b").attention
    spec = spec.replace(split=HeadSplit.last_kv(spec, 4))
    figure = Figure(figsize=(9.6, 4.4), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12), ylim=(0.2, 5.6))
    axes.axis("off")
    draw_stages(axes, spec)
    draw_heads(axes, spec)
    draw_sources(axes, spec)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("layer.svg"))
