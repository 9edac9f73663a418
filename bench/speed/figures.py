"""Costs that grow, drawn: both axes logarithmic, a line for each contestant, and the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lyra.backends.protocol import import_extra
from lyra.studies.figures import INK, STROKES, new_figure

from .show import AXES, duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cost_figure(title: str, option: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Seconds over what grows. The floor is a thick grey line without markers."""
    figure, axes = new_figure()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    strokes = iter(STROKES)
    for name, line in series.items():
        x, y = zip(*line, strict=True)
        if name == "floor":
            axes.plot(x, y, color="#b8c0c8", linewidth=4, label=name, zorder=0)
        else:
            style, marker, colour = next(strokes)
            axes.plot(x, y, linestyle=style, marker=marker, color=colour, markersize=5, linewidth=1.6, label=name)
    points = sorted({x for line in series.values() for x, _ in line})
    axes.set_xticks(points, [f"{point:,}" for point in points])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(import_extra("matplotlib.ticker", "studies").LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: duration(value))
    axes.set(xlabel=AXES.get(option, option), ylabel="time")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False, handlelength=4, fontsize=9)
    return figure
