"""The pictures of `lyra gqa`: what is counted, what is timed, and what is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures import FLOOR, INK, LEGEND, new_figure, strokes
from .groups import groups
from .training import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {"q": ("", "#8fb7d6"), "k": ("///", "#f3d9a8"), "v": ("...", "#ffffff")}
"""Hatch and colour of every part of a bar."""

UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))

AVERAGED = 10
"""Steps that a drawn point of a training curve is the mean of."""

Rows = Sequence[Mapping[str, Any]]
"""What a study gives; the names are those of its JSON."""


def parameter_figure(title: str, rows: Rows) -> Figure:
    """Stacked bars of q, k and v for every number of KV heads, with what each saves above it."""
    figure, (axes,) = new_figure(title)
    names, bottom = [f"{row['kind']}\n{row['kv_heads']} KV" for row in rows], np.zeros(len(rows))
    for part, (hatch, shade) in PARTS.items():
        heights = [row[part] for row in rows]
        style: dict[str, Any] = {"color": shade, "edgecolor": INK, "hatch": hatch, "linewidth": 0.8, "label": part}
        bars = axes.bar(names, heights, bottom=bottom, **style)
        bottom = bottom + heights
    saved = [f"−{row['reduction']:.0%}" if row["reduction"] else "all" for row in rows]
    axes.bar_label(bars, saved, padding=2, color=INK)
    axes.set(ylabel="parameters of one layer's q, k and v")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value >= 1e6 else f"{value:,.0f}")
    axes.legend(**LEGEND | {"handlelength": None}, ncols=3, loc="upper right")
    axes.margins(y=0.15)
    return figure


def cache_figure(title: str, lengths: Sequence[int], series: Mapping[str, Sequence[int]]) -> Figure:
    """Bytes over tokens, both axes logarithmic to base 2, a line for each of `series`."""
    figure, (axes,) = new_figure(title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for (name, y), stroke in zip(series.items(), strokes(len(series)), strict=True):
        axes.plot(lengths, y, **stroke, label=name)
    axes.set_xticks(lengths, [f"{length / 1024:g}k" if length >= 1024 else f"{length:g}" for length in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: size_label(value))
    axes.set(xlabel="tokens", ylabel="keys and values")
    if len(series) <= 6:
        axes.legend(**LEGEND)
    else:
        figure.legend(**LEGEND, fontsize=8, loc="outside right upper")
    return figure


def speed_figure(title: str, rows: Rows) -> Figure:
    """How many times faster than MHA, with quartiles, a panel for each phase; the floor is a thick grey line."""
    phases = groups(rows, lambda row: row["phase"])
    figure, panes = new_figure(title, len(phases), width=4.8 * len(phases))
    for axes, (phase, of_phase) in zip(panes, phases.items(), strict=True):
        backends = groups(of_phase, lambda row: row["backend"])
        floor = next(iter(backends.values()))
        x, y = _columns(floor, "kv_heads", "floor_faster")
        axes.plot(x, y, color=FLOOR, linewidth=5, label="floor", zorder=0)
        for (backend, members), stroke in zip(backends.items(), strokes(len(backends)), strict=True):
            x, y, low, high = _columns(members, "kv_heads", "faster", "low", "high")
            axes.errorbar(x, y, np.maximum(0, (y - low, high - y)), **stroke, capsize=4, label=backend)
        _ticks(axes, floor, "kv_heads", [f"{row['kv_heads']}\n{row['kind']}" for row in floor])
        axes.set_ylim(bottom=0)
        axes.set(xlabel="KV heads")
        axes.set_title(phase, loc="left", fontsize=10, color=INK)
    panes[0].set(ylabel="times faster than MHA")
    panes[0].legend(**LEGEND)
    return figure


def perplexity_figure(title: str, rows: Rows) -> Figure:
    """Held-out perplexity, with the standard deviation over the seeds, against KV heads, bytes cached and,
    where it was timed, a decode step.
    """
    axis_of = {"kv_heads": "KV heads", "cache_bytes": "keys and values of one row", "decode_seconds": "decode step, ms"}
    keys = [key for key in axis_of if key in rows[0]]
    figure, panes = new_figure(title, len(keys), width=4.2 * len(keys))
    backends = groups(rows, lambda row: row["backend"])
    for axes, key in zip(panes, keys, strict=True):
        for (backend, members), stroke in zip(backends.items(), strokes(len(backends)), strict=True):
            x, y = _columns(members, key, "perplexity")
            axes.errorbar(x, y, [row["deviation"] or 0.0 for row in members], **stroke, capsize=4, label=backend)
        axes.set(xlabel=axis_of[key])
    _ticks(panes[0], rows, "kv_heads", [f"{row['kv_heads']}\n{row['kind']}" for row in rows])
    _ticks(panes[1], rows, "cache_bytes", [size_label(row["cache_bytes"]) for row in rows])
    for axes in panes[2:]:
        axes.xaxis.set_major_formatter(lambda value, _: f"{1000 * value:g}")
    panes[0].set(ylabel="perplexity per token")
    if len(backends) > 1:
        panes[0].legend(**LEGEND)
    return figure


def curve_figure(title: str, curves: Sequence[tuple[str, Curve]]) -> Figure:
    """Loss and norm of the gradient over the steps, means of ten, a stroke for each name; seeds share theirs."""
    figure, panes = new_figure(title, 2, width=9.6)
    names = list(dict.fromkeys(name for name, _ in curves))
    stroke_of = dict(zip(names, strokes(len(names)), strict=True))
    for name, curve in curves:
        for axes, values in zip(panes, (curve.loss, curve.gradient_norm), strict=True):
            means = [float(np.mean(part)) for part in np.array_split(values, max(1, len(values) // AVERAGED))]
            steps = np.linspace(len(values) / len(means), len(values), len(means))
            stroke = stroke_of[name] | {"markersize": 3.5, "lw": 1.1, "markevery": max(1, len(means) // 8)}
            axes.plot(steps, means, **stroke, label=name)
    loss, norm = panes
    loss.set(xlabel="steps", ylabel="training loss, nats per token")
    norm.set(xlabel="steps", ylabel="norm of the gradient before clipping", yscale="log")
    for format_ticks in (norm.yaxis.set_major_formatter, norm.yaxis.set_minor_formatter):
        format_ticks("{x:g}")  # a span of less than a decade, for which powers of ten say little
    first = dict(zip(*reversed(loss.get_legend_handles_labels()), strict=True))
    loss.legend(first.values(), first.keys(), **LEGEND)
    return figure


def uptraining_figure(title: str, rows: Rows) -> Figure:
    """Held-out loss over the steps of uptraining, a panel for each number of KV heads, a stroke for each start."""
    whole = [row for row in rows if row["start"] == "whole"]
    kinds = groups((row for row in rows if row["start"] != "whole"), lambda row: row["kind"])
    figure, panes = new_figure(title, len(kinds), width=3.4 * len(kinds), height=3.8)
    for axes, (kind, members) in zip(panes, kinds.items(), strict=True):
        for row, stroke in zip((*members, *whole), strokes(len(members) + len(whole)), strict=True):
            name = f"{row['kind']}, not converted" if row["start"] == "whole" else row["start"]
            axes.plot(*zip(*row["held_out"], strict=True), **stroke, label=name)
        axes.set(xlabel="steps after the conversion")
        axes.set_title(kind, loc="left", fontsize=10, color=INK)
    for axes in panes[1:]:
        axes.sharey(panes[0])
    panes[0].set(ylabel="held-out loss, nats per token")
    panes[-1].legend(**LEGEND, fontsize=9)
    return figure


def size_label(value: float) -> str:
    """Bytes on an axis."""
    return next((f"{value / unit:g} {name}" for unit, name in UNITS if value >= unit), f"{value:g} B")


def _columns(rows: Rows, *keys: str) -> np.ndarray:
    return np.array([[row[key] for row in rows] for key in keys])


def _ticks(axes: Axes, rows: Rows, key: str, names: Sequence[str]) -> None:
    """A logarithmic axis with a tick for every value of a key and nothing between."""
    axes.set_xscale("log", base=2)
    ticks = dict(zip((row[key] for row in rows), names, strict=True))
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
