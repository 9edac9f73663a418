"""How the studies draw: lines that are told apart by stroke and marker first and by colour second, so that they also
print in black and white."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyra.backends.protocol import import_extra
from lyra.spec.errors import InputError
from lyra.spec.files import write_atomically
from lyra.terminal import paragraphs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#1f2933", "#d9dee3"
FORMATS = (".png", ".svg")
STROKES: tuple[tuple[Any, str, str], ...] = (
    ("-", "o", "#7a4f00"),
    ("--", "s", "#1f5f93"),
    ("-.", "^", "#c46a00"),
    (":", "D", "#3f7f3f"),
    ((0, (5, 1, 1, 1, 1, 1)), "v", "#8a3d7a"),
    ("--", "x", "#52606d"),
)
"""Line style, marker and colour of the n-th line."""


HATCHES = ("", "///", "...")
"""Fill of the n-th part of a bar."""

UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def parameter_figure(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Stacked bars of q, k and v for every number of KV heads, with what each saves above it."""
    figure, axes = new_figure()
    names = [f"{row['kind']}\n{row['kv_heads']} KV" for row in rows]
    bottom = [0.0] * len(rows)
    for part, hatch, shade in zip(("q", "k", "v"), HATCHES, ("#8fb7d6", "#f3d9a8", "#ffffff"), strict=True):
        heights = [row[part] for row in rows]
        axes.bar(names, heights, bottom=bottom, color=shade, edgecolor=INK, hatch=hatch, linewidth=0.8, label=part)
        bottom = [low + high for low, high in zip(bottom, heights, strict=True)]
    for index, row in enumerate(rows):
        label = f"−{row['reduction']:.0%}" if row["reduction"] else "all"
        axes.annotate(label, (index, bottom[index]), xytext=(0, 4), textcoords="offset points", ha="center", color=INK)
    axes.set(ylabel="parameters of one layer's q, k and v")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value:,.0f}")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False, ncols=3, loc="upper right")
    axes.margins(y=0.15)
    return figure


def cache_figure(title: str, lengths: Sequence[int], series: Mapping[str, Sequence[int]]) -> Figure:
    """Bytes over tokens, both axes logarithmic to base 2, a line for each of `series`."""
    figure, axes = new_figure()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for (name, y), (style, marker, colour) in zip(series.items(), strokes(len(series)), strict=True):
        axes.plot(lengths, y, linestyle=style, marker=marker, color=colour, markersize=5, linewidth=1.6, label=name)
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: size_label(value))
    axes.set(xlabel="tokens", ylabel="keys and values")
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    if len(series) <= len(STROKES):
        axes.legend(frameon=False, handlelength=4)
    else:
        figure.legend(frameon=False, handlelength=4, fontsize=8, loc="outside right upper")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as what its name ends in. Raises InputError for another ending."""
    check_figure(path)
    import matplotlib as mpl

    _take_text_for_text(figure)

    file = io.BytesIO()
    kind = path.suffix.removeprefix(".")
    with mpl.rc_context({"svg.hashsalt": "lyra"}):
        figure.savefig(file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_atomically(path, file.getvalue())


def _take_text_for_text(figure: Figure) -> None:
    """Names of models and files are no formulas, whatever they hold; what axes write at their ticks may be."""
    from matplotlib.text import Text

    at_ticks = {id(text) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in axis.findobj(Text)}
    labels = {id(axis.label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)}
    for text in figure.findobj(Text):
        if id(text) not in at_ticks - labels:
            text.set_parse_math(False)
            text.set_text(paragraphs(text.get_text()))


def check_figure(*paths: Path | None) -> None:
    """Refuse a figure that could not be drawn: before the work for it. Raises InputError for another ending, and
    ImportError with the command that installs matplotlib, where it is not.
    """
    for path in paths:
        if path is not None and path.suffix not in FORMATS:
            raise InputError(f"cannot draw {str(path)!r}: the name must end in {' or '.join(FORMATS)}")
        if path is not None:
            import_extra("matplotlib", "studies")


def new_figure() -> tuple[Figure, Axes]:
    """A figure with one set of axes. Raises ImportError with the command that installs matplotlib, where it is not."""
    figure, (axes,) = panels(1)
    return figure, axes


def panels(count: int, width: float = 7.2, height: float = 4.4) -> tuple[Figure, list[Axes]]:
    """The same with several sets of axes side by side, in a figure of so many inches."""
    figure = import_extra("matplotlib.figure", "studies").Figure(figsize=(width, height), layout="constrained")
    found = [figure.add_subplot(1, count, number + 1) for number in range(count)]
    for axes in found:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(True, axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, found


def strokes(count: int) -> list[tuple[Any, str, str]]:
    """Line style, marker and colour of so many lines; no two of 36 are alike."""
    kinds = len(STROKES)
    places = [(index % kinds, (index + index // kinds) % kinds) for index in range(count)]
    return [(STROKES[line][0], STROKES[marker][1], STROKES[line][2]) for line, marker in places]


def _short(length: float) -> str:
    return f"{length / 1024:g}k" if length >= 1024 else f"{length:g}"


def size_label(value: float) -> str:
    """Bytes on an axis."""
    for unit, name in UNITS:
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value:g} B"
