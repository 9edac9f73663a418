"""How everything is drawn: lines that are told apart by stroke and marker first and by colour second, so that they also
print in black and white.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra.backends.protocol import import_extra
from lyra.spec.errors import InputError
from lyra.spec.files import write_atomically
from lyra.terminal import paragraphs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, FLOOR = "#1f2933", "#d9dee3", "#b8c0c8"
FORMATS = (".png", ".svg")
KINDS: tuple[tuple[Any, str, str], ...] = (
    ("-", "o", "#7a4f00"),
    ("--", "s", "#1f5f93"),
    ("-.", "^", "#c46a00"),
    (":", "D", "#3f7f3f"),
    ((0, (5, 1, 1, 1, 1, 1)), "v", "#8a3d7a"),
    ("--", "x", "#52606d"),
)
"""Line style, marker and colour of the n-th line."""

LEGEND: dict[str, Any] = {"frameon": False, "handlelength": 4}


def strokes(count: int) -> list[dict[str, Any]]:
    """How so many lines are drawn, in matplotlib's own words; no two of 36 are alike."""
    places = [(index % len(KINDS), (index + index // len(KINDS)) % len(KINDS)) for index in range(count)]
    return [
        {"linestyle": KINDS[line][0], "marker": KINDS[marker][1], "color": KINDS[line][2], "markersize": 5, "lw": 1.6}
        for line, marker in places
    ]


def new_figure(title: str, panels: int = 1, width: float = 7.2, height: float = 4.4) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches with its title, and axes side by side.

    Raises ImportError with the command that installs matplotlib, where it is not.
    """
    figure = import_extra("matplotlib.figure", "studies").Figure(figsize=(width, height), layout="constrained")
    panes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in panes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    if panels == 1:
        panes[0].set_title(title, loc="left", fontsize=11, color=INK)
    else:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure, panes


def save(figure: Figure, path: Path) -> None:
    """Write a figure as what its name ends in. Raises InputError for another ending."""
    check_figure(path)
    import matplotlib as mpl

    _take_text_for_text(figure)
    file, kind = io.BytesIO(), path.suffix.removeprefix(".")
    with mpl.rc_context({"svg.hashsalt": "lyra"}):
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, file.getvalue())


def check_figure(*paths: Path | None) -> None:
    """Refuse a figure that could not be drawn: before the work for it. Raises InputError for another ending, and
    ImportError with the command that installs matplotlib, where it is not.
    """
    for path in paths:
        if path is not None and path.suffix not in FORMATS:
            raise InputError(f"cannot draw {str(path)!r}: the name must end in {' or '.join(FORMATS)}")
        if path is not None:
            import_extra("matplotlib", "studies")


def _take_text_for_text(figure: Figure) -> None:
    """Names of models and files are no formulas, whatever they hold; what axes write at their ticks may be."""
    from matplotlib.text import Text

    at_ticks = {id(text) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in axis.findobj(Text)}
    labels = {id(axis.label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)}
    for text in figure.findobj(Text):
        if id(text) not in at_ticks - labels:
            text.set_parse_math(False)
            text.set_text(paragraphs(text.get_text()))
