"""Costs that grow, drawn: both axes logarithmic, a line for each contestant, and the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lyra.backends.protocol import import_extra
from lyra.quantities import duration
from lyra.studies.figures import FLOOR, LEGEND, new_figure, strokes

from .show import AXES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cost_figure(title: str, option: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Seconds over what grows. The floor is a thick grey line without markers."""
    figure, (axes,) = new_figure(title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    free = iter(strokes(len(series)))
    for name, line in series.items():
        stroke = {"color": FLOOR, "linewidth": 4, "zorder": 0} if name == "floor" else next(free)
        axes.plot(*zip(*line, strict=True), **stroke, label=name)
    points = sorted({point for line in series.values() for point, _ in line})
    axes.set_xticks(points, [f"{point:,}" for point in points])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(import_extra("matplotlib.ticker", "studies").LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: duration(value))
    axes.set(xlabel=AXES.get(option, option), ylabel="time")
    axes.legend(**LEGEND, fontsize=9)
    return figure
