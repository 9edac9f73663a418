"""The head map as a picture: which heads of a layer go to Lyra, and which layers of the model have such heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lyra.backends.protocol import import_extra
from lyra.spec.attention import AttentionSpec
from lyra.spec.model import ModelSpec
from lyra.studies.figures import save

from .output import head_list

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, DIM, PAPER = "#1f2933", "#52606d", "#ffffff"
LYRA, VANILLA = ("#f0b042", "#7a4f00"), ("#d3e6f5", "#1f5f93")
"""Fill and edge. Orange and blue differ in hue and in lightness, for every kind of colour vision and in grey."""

GLOBAL, SLIDING = "#f0b042", "#e4e7eb"
CELL, ROW, GAP = 0.44, 0.36, 0.16
KV_ROW, LINE_GAP, LEFT, EDGE, SMALLEST = 0.32, 0.30, 1.25, 0.3, 6.8
LETTER = 0.12
"""Room for a letter of the title."""

A_ROW, A_LINE = 16, 24
"""Query heads in one row of a group, and in one line of groups."""


@dataclass(frozen=True)
class Grid:
    """Where heads stand: inches from the left and downwards from the first line."""

    heads: int
    kv_heads: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def columns(self) -> int:
        """Query heads in one row of a group."""
        return min(self.group, A_ROW)

    @property
    def group_width(self) -> float:
        """How wide a group is."""
        return self.columns * CELL

    @property
    def groups_a_line(self) -> int:
        """Groups in one line."""
        return min(self.kv_heads, max(1, A_LINE // self.columns))

    @property
    def line_height(self) -> float:
        """KV head and query heads of one line."""
        return KV_ROW + -(-self.group // self.columns) * ROW

    @property
    def lines(self) -> int:
        """Lines of groups."""
        return -(-self.kv_heads // self.groups_a_line)

    @property
    def width(self) -> float:
        """How wide a line is."""
        return self.groups_a_line * (self.group_width + GAP) - GAP

    @property
    def height(self) -> float:
        """How high all lines are."""
        return self.lines * (self.line_height + LINE_GAP) - LINE_GAP

    def kv_head(self, index: int) -> tuple[float, float]:
        """The upper left corner of a KV head."""
        line, place = divmod(index, self.groups_a_line)
        return place * (self.group_width + GAP), line * (self.line_height + LINE_GAP)

    def head(self, index: int) -> tuple[float, float]:
        """The upper left corner of a query head."""
        kv_head, place = divmod(index, self.group)
        x, y = self.kv_head(kv_head)
        row, column = divmod(place, self.columns)
        return x + column * CELL, y + KV_ROW + row * ROW


def save_head_map(paths: Sequence[Path], name: str, attention: AttentionSpec, model: ModelSpec | None) -> None:
    """Draw the split of a layer, and the layers of its model, into files; their endings say the formats.

    Raises ImportError with the command that installs matplotlib, where it is not.
    """
    import_extra("matplotlib", "studies")
    import matplotlib as mpl

    with mpl.rc_context({"font.family": "DejaVu Sans"}):
        figure = draw(name, attention, model)
        for path in paths:
            save(figure, path)


def draw(name: str, attention: AttentionSpec, model: ModelSpec | None) -> Figure:
    """The picture, one unit of its axes being an inch: title, heads, layers, legend from top to bottom."""
    from matplotlib.figure import Figure

    grid = Grid(attention.num_attention_heads, attention.num_key_value_heads)
    title = _title(name, attention)
    width = max(SMALLEST, LEFT + grid.width + EDGE, 2 * EDGE + LETTER * len(title))
    layers = 1.15 if model is not None else 0.0
    legend = 0.30 * len(_legend(attention, model)) + 0.1
    height = EDGE + 0.75 + grid.height + 0.35 + layers + legend + EDGE
    figure = Figure(figsize=(width, height), facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    axes.text(EDGE, EDGE + 0.1, title, va="center", fontsize=13, weight="bold", color=INK)
    axes.text(EDGE, EDGE + 0.4, _subtitle(attention), va="center", fontsize=9.5, color=DIM)
    top = EDGE + 0.75
    _draw_heads(axes, grid, attention, top)
    top += grid.height + 0.35
    if model is not None:
        _draw_layers(axes, model, attention, top, width - LEFT - EDGE)
        top += layers
    _draw_legend(axes, _legend(attention, model), top)
    return figure


def _title(name: str, attention: AttentionSpec) -> str:
    count = len(attention.lyra_q_heads)
    return f"{name}: {count or 'none'} of {attention.num_attention_heads} query heads go{'es' * (count == 1)} to Lyra"


def _subtitle(attention: AttentionSpec) -> str:
    split = attention.split
    assert split is not None
    alone = attention.group_size == 1
    groups = "a KV head for each query head" if alone else f"{attention.group_size} query heads read each KV head"
    if cut := split.cut_kv_heads:
        serve = f"head {cut[0]} serves" if len(cut) == 1 else f"heads {head_list(cut)} serve"
        return f"{groups}; KV {serve} both streams"
    return f"{groups}; no KV head serves both streams"


def _draw_heads(axes: Axes, grid: Grid, attention: AttentionSpec, top: float) -> None:
    """KV heads over the query heads that read them; a KV head of both streams is half one, half the other."""
    split = attention.split
    assert split is not None
    lyra, cut = set(attention.lyra_q_heads), set(split.cut_kv_heads)
    for kv_head in range(grid.kv_heads):
        x, y = grid.kv_head(kv_head)
        place = (LEFT + x, top + y, grid.group_width, KV_ROW - 0.05)
        label = f"KV {kv_head}" if grid.group > 1 else str(kv_head)
        if kv_head in cut:
            _shared(axes, *place, label)
        else:
            draw_box(axes, *place, LYRA if kv_head in attention.lyra_kv_heads else VANILLA, label)
    for head in range(grid.heads):
        x, y = grid.head(head)
        draw_box(axes, LEFT + x + 0.02, top + y, CELL - 0.04, ROW - 0.05, LYRA if head in lyra else VANILLA, str(head))
    for line in range(grid.lines):
        y = top + line * (grid.line_height + LINE_GAP)
        axes.text(LEFT - 0.12, y + KV_ROW / 2 - 0.02, "KV heads", ha="right", va="center", fontsize=9, color=DIM)
        middle = y + (KV_ROW + grid.line_height) / 2 - 0.02
        axes.text(LEFT - 0.12, middle, "query heads", ha="right", va="center", fontsize=9, color=DIM)


def _shared(axes: Axes, x: float, y: float, width: float, height: float, label: str) -> None:
    """A KV head of both streams: both colours, hatched, its name on a plain ground."""
    from matplotlib.patches import Rectangle

    for part, colours in enumerate((VANILLA, LYRA)):
        corner = (x + part * width / 2, y)
        axes.add_patch(Rectangle(corner, width / 2, height, facecolor=colours[0], edgecolor=INK, lw=0, hatch="///"))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=INK, lw=1.6))
    if label:
        ground = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.2}
        axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=8.5, color=INK, bbox=ground)


def _draw_layers(axes: Axes, model: ModelSpec, attention: AttentionSpec, top: float, width: float) -> None:
    """One box a layer, in their order; the global ones are higher and numbered."""
    step = width / model.num_hidden_layers
    carries = bool(attention.lyra_q_heads)
    axes.text(LEFT - 0.12, top + 0.25, "layers", ha="right", va="center", fontsize=9, color=DIM)
    for index in range(model.num_hidden_layers):
        x = LEFT + index * step
        if index in model.global_layers:
            colours = (GLOBAL, LYRA[1]) if carries else (VANILLA[0], VANILLA[1])
            draw_box(axes, x, top, step * 0.86, 0.5, colours, "")
        else:
            draw_box(axes, x, top + 0.1, step * 0.86, 0.3, (SLIDING, "#9aa5b1"), "")
    numbered = model.global_layers[:: max(1, round(0.26 / (step * _spacing(model))))]
    for index in numbered:
        axes.text(LEFT + (index + 0.43) * step, top + 0.66, str(index), ha="center", va="center", fontsize=8, color=INK)


def _spacing(model: ModelSpec) -> float:
    """Layers from one global layer to the next, on average."""
    return model.num_hidden_layers / max(1, len(model.global_layers))


def _legend(attention: AttentionSpec, model: ModelSpec | None) -> list[tuple[str, str]]:
    """What the colours mean: kind of swatch and words, of those that the picture has."""
    split = attention.split
    assert split is not None
    entries = [("lyra", f"Lyra: reads the static context{attention.static.sees.words}")] if split.lyra_q_heads else []
    entries += [("vanilla", "vanilla: reads the live tokens only")] if split.vanilla_q_heads else []
    entries += [("shared", "KV head of a cut group: serves both streams")] if split.cut_kv_heads else []
    if model is not None:
        carry = "have these Lyra heads" if split.lyra_q_heads else "have no Lyra heads either"
        count = len(model.global_layers)
        entries.append(("global", f"{count} global layers of {model.num_hidden_layers}, numbered from 0: {carry}"))
    if model is not None and model.sliding is not None:
        entries.append(("sliding", f"sliding-window layers, {model.sliding.sliding_window} tokens: no Lyra heads"))
    return entries


def _draw_legend(axes: Axes, entries: Sequence[tuple[str, str]], top: float) -> None:
    swatches = {"lyra": LYRA, "vanilla": VANILLA, "global": (GLOBAL, LYRA[1]), "sliding": (SLIDING, "#9aa5b1")}
    for row, (kind, words) in enumerate(entries):
        y = top + row * 0.30
        if kind == "shared":
            _shared(axes, LEFT, y, CELL, 0.2, "")
        elif kind in ("global", "sliding"):
            draw_box(axes, LEFT + 0.15, y, 0.12, 0.2, swatches[kind], "")
        else:
            draw_box(axes, LEFT, y, CELL, 0.2, swatches[kind], "")
        axes.text(LEFT + CELL + 0.15, y + 0.1, words, va="center", fontsize=9.5, color=INK)


def draw_box(axes: Axes, x: float, y: float, width: float, height: float, colours: tuple[str, str], text: str) -> None:
    """A box with text in its middle."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colours[0], edgecolor=colours[1], lw=0.9))
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, color=INK)
