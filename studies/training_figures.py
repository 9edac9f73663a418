"""Pictures of what was trained: perplexity with error bars, and the curves of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures import INK, panels, size_label, strokes
from .training import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AVERAGED = 10
"""Steps that a drawn point of a training curve is the mean of."""


def perplexity_figure(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out perplexity, with the standard deviation over the seeds, against KV heads, bytes cached and,
    where it was timed, a decode step.
    """
    columns = ("kv_heads", "cache_bytes", "decode_seconds")[: 3 if "decode_seconds" in rows[0] else 2]
    figure, axes = panels(len(columns), width=4.2 * len(columns))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for backend, (style, marker, colour) in zip(backends, strokes(len(backends)), strict=True):
        own = [row for row in rows if row["backend"] == backend]
        for one, key in zip(axes, columns, strict=True):
            one.errorbar(
                [row[key] for row in own],
                [row["perplexity"] for row in own],
                [row["deviation"] or 0.0 for row in own],
                linestyle=style, marker=marker, color=colour, markersize=5, linewidth=1.6, capsize=4, label=backend,
            )  # fmt: skip
    _powers(axes[0], rows, "kv_heads", lambda row: f"{row['kv_heads']}\n{row['kind']}")
    _powers(axes[1], rows, "cache_bytes", lambda row: size_label(row["cache_bytes"]))
    axes[0].set(xlabel="KV heads", ylabel="perplexity per token")
    axes[1].set(xlabel="keys and values of one row")
    if len(columns) > 2:
        axes[2].set(xlabel="decode step, ms")
        axes[2].xaxis.set_major_formatter(lambda value, _: f"{1000 * value:g}")
    if len(backends) > 1:
        axes[0].legend(frameon=False, handlelength=4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def curve_figure(title: str, curves: Sequence[tuple[str, Curve]]) -> Figure:
    """Loss and norm of the gradient over the steps, means of ten, a stroke for each name; seeds share theirs."""
    figure, axes = panels(2, width=9.6)
    names = list(dict.fromkeys(name for name, _ in curves))
    drawn = dict(zip(names, strokes(len(names)), strict=True))
    labelled: set[str] = set()
    for name, curve in curves:
        style, marker, colour = drawn[name]
        for one, values in zip(axes, (curve.loss, curve.gradient_norm), strict=True):
            means = [float(np.mean(part)) for part in np.array_split(values, max(1, len(values) // AVERAGED))]
            steps = np.linspace(len(values) / len(means), len(values), len(means))
            one.plot(
                steps, means, linestyle=style, marker=marker, color=colour, markersize=3.5, linewidth=1.1,
                markevery=max(1, len(means) // 8), label=None if name in labelled else name,
            )  # fmt: skip
        labelled.add(name)
    axes[0].set(xlabel="steps", ylabel="training loss, nats per token")
    axes[1].set(xlabel="steps", ylabel="norm of the gradient before clipping", yscale="log")
    for axis in (axes[1].yaxis.set_major_formatter, axes[1].yaxis.set_minor_formatter):
        axis("{x:g}")  # a span of less than a decade, for which powers of ten say little
    axes[0].legend(frameon=False, handlelength=4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def uptraining_figure(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out loss over the steps of uptraining, a panel for each number of KV heads, a stroke for each start."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row["start"] != "whole"))
    figure, axes = panels(len(kinds), width=3.4 * len(kinds), height=3.8)
    whole = [row for row in rows if row["start"] == "whole"]
    for one, kind in zip(axes, kinds, strict=True):
        lines = [row for row in rows if row["kind"] == kind] + whole
        for row, (style, marker, colour) in zip(lines, strokes(len(lines)), strict=True):
            name = f"{row['kind']}, not converted" if row["start"] == "whole" else row["start"]
            x, y = zip(*row["held_out"], strict=True)
            one.plot(x, y, linestyle=style, marker=marker, color=colour, markersize=5, linewidth=1.6, label=name)
        one.set(xlabel="steps after the conversion")
        one.set_title(kind, loc="left", fontsize=10, color=INK)
    for one in axes[1:]:
        one.sharey(axes[0])
    axes[0].set(ylabel="held-out loss, nats per token")
    axes[-1].legend(frameon=False, handlelength=4, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _powers(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, label: Any) -> None:
    """A logarithmic axis with a tick for every number of KV heads and nothing between."""
    axes.set_xscale("log", base=2)
    ticks = {row[key]: label(row) for row in rows}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
