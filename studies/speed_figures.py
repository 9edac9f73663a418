"""Picture of the speed of a layer over its number of KV heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .figures import INK, panels, strokes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLOOR = "#b8c0c8"


def speed_figure(title: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """How many times faster than MHA, with quartiles, a panel for each phase; the floor is a thick grey line."""
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    figure, axes = panels(len(phases), width=4.8 * len(phases))
    for one, phase in zip(axes, phases, strict=True):
        of_phase = [row for row in rows if row["phase"] == phase]
        floor = [row for row in of_phase if row["backend"] == backends[0]]
        heads = [row["kv_heads"] for row in floor]
        one.plot(heads, [row["floor_faster"] for row in floor], color=FLOOR, linewidth=5, label="floor", zorder=0)
        for backend, (style, marker, colour) in zip(backends, strokes(len(backends)), strict=True):
            own = [row for row in of_phase if row["backend"] == backend]
            faster = [row["faster"] for row in own]
            spread = [
                [max(0.0, row["faster"] - row["low"]) for row in own],
                [max(0.0, row["high"] - row["faster"]) for row in own],
            ]
            one.errorbar(
                heads, faster, spread, linestyle=style, marker=marker, color=colour, markersize=5, linewidth=1.6,
                capsize=4, label=backend,
            )  # fmt: skip
        one.set_xscale("log", base=2)
        one.set_xticks(heads, [f"{row['kv_heads']}\n{row['kind']}" for row in floor])
        one.minorticks_off()
        one.set_ylim(bottom=0)
        one.set(xlabel="KV heads")
        one.set_title(phase, loc="left", fontsize=10, color=INK)
    axes[0].set(ylabel="times faster than MHA")
    axes[0].legend(frameon=False, handlelength=4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return figure
