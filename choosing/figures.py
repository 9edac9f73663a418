"""The report as a picture: the gain over the number of heads, and what each head gains alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lyra.backends.protocol import import_extra
from lyra.studies.figures import GRID, INK, LEGEND, strokes

from .choice import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = " ░▒▓█"
"""From nothing to the most, for terminals."""

CELL = 0.62
"""Inches of a head in the heat map."""


def shade(share: float) -> str:
    """A character as dark as a share from 0 to 1; nothing below 0."""
    return SHADES[min(len(SHADES) - 1, max(0, round(share * (len(SHADES) - 1))))]


def choice_figure(report: Report) -> Figure:
    """Curve and heat map side by side. Raises ImportError, with what to install, where matplotlib is not."""
    layers, heads = report.alone["score"].shape
    width = 6.4 + max(2.8, heads * CELL + 1.2)
    height = max(4.6, layers * CELL + 1.6)
    figure: Figure = import_extra("matplotlib.figure", "studies").Figure(figsize=(width, height), layout="constrained")
    curve, heat = figure.subplots(1, 2, width_ratios=(6.4, width - 6.4))
    figure.suptitle(f"{report.choice.model}: which heads read a context", x=0.01, ha="left", fontsize=12, color=INK)
    _draw_curve(curve, report)
    _draw_heat(heat, report)
    return figure


def _draw_curve(axes: Axes, report: Report) -> None:
    """Held-out gain in % of all heads', a line for each kind; below each number of heads what its context takes."""
    heads = [point.heads for point in report.curve]
    for kind, stroke in zip(report.kinds, strokes(len(report.kinds)), strict=True):
        gains = [100 * report.share(point, "held_out", kind) for point in report.curve]
        axes.plot(heads, gains, **stroke, label=kind)
    axes.axhline(100, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.axvline(report.point.heads, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.annotate(
        "chosen", (report.point.heads, axes.get_ylim()[0]), xytext=(3, 3), textcoords="offset points", color=INK
    )
    mib = [f"{point.heads}\n{point.bytes_per_1000_tokens / 2**20:.3g}" for point in report.curve]
    axes.set_xticks(heads, mib, fontsize=8.5)
    axes.set(xlabel="heads, and MiB of context for 1,000 tokens", ylabel="gain on held-out documents, % of all heads'")
    axes.legend(**LEGEND, loc="lower right")
    axes.grid(True, axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_heat(axes: Axes, report: Report) -> None:
    """Layer by head, the darker the more a head gains alone; chosen heads in a frame, with their place in the order."""
    from matplotlib.patches import Rectangle

    gains = 100 * report.alone["score"]
    top = max(float(gains.max()), 1e-9)
    axes.imshow(gains, cmap="Greys", vmin=0.0, vmax=top * 1.25, aspect="equal")
    places = {head: place for place, head in enumerate(report.order, 1)}
    for row, layer in enumerate(report.choice.layers):
        split = report.point.splits.get(layer)
        for head, gain in enumerate(gains[row].tolist()):
            ink = "white" if gain > 0.6 * top else INK
            axes.text(head, row + 0.1, f"{gain:+.0f}", ha="center", va="center", fontsize=9, color=ink)
            axes.text(head, row - 0.28, f"#{places[layer, head]}", ha="center", va="center", fontsize=7, color=ink)
            if split is not None and head in split.lyra_q_heads:
                frame = Rectangle((head - 0.45, row - 0.45), 0.9, 0.9, fill=False, edgecolor="#c46a00", linewidth=2.6)
                axes.add_patch(frame)
    axes.set_xticks(range(gains.shape[1]))
    axes.set_yticks(range(len(report.choice.layers)), [str(layer) for layer in report.choice.layers])
    axes.set(xlabel="query head", ylabel="global layer")
    axes.set_title("gain alone, % of all heads'; # order,\nframed: chosen", loc="left", fontsize=9.5, color=INK)
    axes.tick_params(length=0)
