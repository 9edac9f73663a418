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
    """Held-out perplexity, with the standard deviation over the seeds, against KV heads and against bytes cached."""
    figure, axes = panels(2, width=9.6)
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    for backend, (style, marker, colour) in zip(backends, strokes(len(backends)), strict=True):
        own = [row for row in rows if row["backend"] == backend]
        for one, key in zip(axes, ("kv_heads", "cache_bytes"), strict=True):
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
    if len(backends) > 1:
        axes[1].legend(frameon=False, handlelength=4)
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
    axes[0].legend(frameon=False, handlelength=4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _powers(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, label: Any) -> None:
    """A logarithmic axis with a tick for every number of KV heads and nothing between."""
    axes.set_xscale("log", base=2)
    ticks = {row[key]: label(row) for row in rows}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
