"""Draws docs/images/house.svg: the layers of Lyra, what is in each, and who calls a backend's one pipeline.

python docs/images/draw_house.py [PATH]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from lyra.spec.attention import STAGES

INK, PALE = "#1f2933", "#7b8794"
LAYER, ROOM = ("#f5f7fa", "#9aa5b1"), ("#ffffff", "#52606d")
TORCH, JAX, JUDGE = ("#dbe7f5", "#2b5c8a"), ("#d8f0df", "#1e7a3e"), ("#fdf0d5", "#9a6700")
WIDTH, LEFT, RIGHT = 12.0, 0.15, 11.85


def box(
    axes: Axes, x: float, y: float, width: float, height: float, colours: tuple[str, str], title: str, *lines: str
) -> None:
    """A rounded box with a title in its first line and smaller lines below it."""
    fill, edge = colours
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.2))
    top = y + height - 0.22
    axes.text(x + 0.14, top, title, ha="left", va="center", color=edge, fontsize=9.5, weight="bold")
    for number, line in enumerate(lines):
        axes.text(x + 0.14, top - 0.27 - 0.235 * number, line, ha="left", va="center", color=INK, fontsize=7.8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """An arrow from start to end."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.4, "mutation_scale": 12})


def band(axes: Axes, y: float, height: float) -> None:
    """The background of a layer, as wide as the page."""
    style = "round,pad=0,rounding_size=0.08"
    fill, edge = LAYER
    patch = FancyBboxPatch(
        (LEFT, y), RIGHT - LEFT, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=0.8
    )
    axes.add_patch(patch)


def draw_spec(axes: Axes) -> None:
    """What is true, below everything else."""
    band(axes, 0.1, 1.15)
    box(axes, 0.3, 0.22, 2.5, 0.91, ROOM, "SPEC.md", "clauses and statements;", "clauses.py: the same as data")
    box(axes, 2.95, 0.22, 2.5, 0.91, ROOM, "specs, splits, families", "attention, model, split;", "families/gemma3")
    box(axes, 5.6, 0.22, 2.5, 0.91, ROOM, "contexts", "context, storage, its file;", "inputs: the door of a call")
    box(
        axes,
        8.25,
        0.22,
        3.0,
        0.91,
        JUDGE,
        "the oracle",
        "reference, gradients: NumPy float64,",
        "each value with its σ (uncertain)",
    )
    axes.text(11.72, 0.68, "spec/", ha="right", va="center", color=PALE, fontsize=9, rotation=90)


def draw_pipeline(axes: Axes, x: float, colours: tuple[str, str], name: str, module: str, extra: str) -> None:
    """One backend: who calls the pipeline, and its stages."""
    box(axes, x, 1.62, 4.85, 2.0, colours, f"{name}_impl")
    for number, caller in enumerate(("the protocol's layer", module, "injected blocks")):
        left = x + 0.14 + 1.56 * number
        box(axes, left, 2.83, 1.47, 0.36, ("#ffffff", colours[1]), "")
        axes.text(left + 0.735, 3.01, caller, ha="center", va="center", color=INK, fontsize=7.2)
        arrow(axes, (left + 0.735, 2.82), (left + 0.735, 2.62), colours[1])
    step = 4.57 / len(STAGES)
    for number, stage in enumerate(STAGES):
        left = x + 0.14 + step * number
        axes.add_patch(
            FancyBboxPatch(
                (left, 2.27),
                step - 0.1,
                0.33,
                boxstyle="round,pad=0,rounding_size=0.08",
                facecolor=colours[1],
                edgecolor=colours[1],
            )
        )
        axes.text(left + (step - 0.1) / 2, 2.435, stage, ha="center", va="center", color="white", fontsize=8)
        if number:
            arrow(axes, (left - 0.12, 2.435), (left + 0.02, 2.435), colours[1])
    axes.text(
        x + 0.14,
        2.05,
        "layer.run_layer, over norm, rope, heads, partial, static, cache, visibility",
        color=INK,
        fontsize=7.2,
    )
    axes.text(x + 0.14, 1.8, extra, color=INK, fontsize=7.2)


def draw_backends(axes: Axes) -> None:
    """Two implementations that mirror each other, and what both are found and checked by."""
    band(axes, 1.5, 2.25)
    draw_pipeline(
        axes,
        0.3,
        TORCH,
        "torch",
        "the HF modules",
        "families/gemma3: Hugging Face's classes; injector, hf_cache, offload …",
    )
    draw_pipeline(
        axes, 5.3, JAX, "jax", "the nnx modules", "families/gemma3: the nnx modules; forward, rolling, shapes …"
    )
    box(axes, 10.3, 1.62, 1.12, 2.0, ROOM, "protocol", "registry", "checkpoint", "sampling")
    axes.text(11.72, 2.62, "backends/", ha="right", va="center", color=PALE, fontsize=9, rotation=90)


def draw_front(axes: Axes) -> None:
    """The front door, and beside it the judge."""
    band(axes, 4.0, 1.75)
    box(
        axes,
        0.3,
        4.12,
        2.9,
        1.51,
        ROOM,
        "api/ is lyra",
        "load, Model, StaticContext, Lyra",
        "checkpoints, .gguf files, texts",
        "generation, scores, streams",
    )
    box(axes, 3.35, 4.12, 7.9, 1.51, JUDGE, "conformance/")
    rooms = (
        ("strategies", "case sizes,", "random arrays"),
        ("properties", "of statements,", "with a premise"),
        ("subjects", "torch, jax, yours;", "torch-, jax-module"),
        ("judge", "|Δ| ≤ K·σ: oracles,", "relations"),
        ("report", "of all workers;", "cases to replay"),
    )
    for number, (title, *lines) in enumerate(rooms):
        left = 3.5 + 1.54 * number
        box(axes, left, 4.24, 1.42, 0.98, ("#ffffff", JUDGE[1]), title, *lines)
        if number:
            arrow(axes, (left - 0.14, 4.73), (left + 0.02, 4.73), JUDGE[1])
    axes.text(
        11.1,
        5.41,
        "faults: edits of a backend's source that the suite must notice",
        ha="right",
        va="center",
        color=INK,
        fontsize=7.8,
    )
    arrow(axes, (7.29, 4.22), (7.29, 3.78), JUDGE[1])
    arrow(axes, (1.75, 4.1), (1.75, 3.78), ROOM[1])


def draw_users(axes: Axes) -> None:
    """What stands on all of it."""
    band(axes, 6.0, 0.95)
    rooms = (
        ("choosing/", "which heads read a context"),
        ("studies/", "what sharing KV heads saves and costs"),
        ("bench/speed/", "everything timed beside Hugging Face"),
    )
    for number, (title, line) in enumerate(rooms):
        box(axes, 0.3 + 3.68 * number, 6.12, 3.53, 0.71, ROOM, title, line)
    band(axes, 7.2, 0.62)
    axes.text(
        WIDTH / 2,
        7.51,
        "api/cli: lyra conform, faults, generate, capture, split, choose, gqa, bench …",
        ha="center",
        va="center",
        color=INK,
        fontsize=9,
    )
    for y in (7.19, 5.99):
        arrow(axes, (WIDTH / 2, y), (WIDTH / 2, y - 0.22), PALE)
    arrow(axes, (WIDTH / 2, 1.49), (WIDTH / 2, 1.27), PALE)


def draw(path: Path) -> None:
    """Write the picture."""
    mpl.rcParams |= {"svg.hashsalt": "lyra", "font.family": "DejaVu Sans"}
    figure = Figure(figsize=(9.6, 6.4), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, 8.0))
    axes.axis("off")
    draw_spec(axes)
    draw_backends(axes)
    draw_front(axes)
    draw_users(axes)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("house.svg"))
