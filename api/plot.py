"""Pictures of what heads look at: which tokens of a context each Lyra head reads. Needs the extra `studies`.

import lyra.plot

    model.attach(context, split)
    lyra.plot.reads(model, "a prompt").savefig("reads.png")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from lyra.backends.protocol import import_extra

from .errors import ModelError
from .model import Ids, Model

import_extra("matplotlib", "studies")

from matplotlib import transforms  # noqa: E402  # only where it is installed
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap, PowerNorm  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

INK, PALE, GRID = "#1f2933", "#7b8794", "#d5dae1"
LYRA, LIVE = "#1e7a3e", "#9fb6cf"
SHADES = LinearSegmentedColormap.from_list("lyra", ["#f7faf8", "#bfe3cb", "#4fae74", LYRA, "#0b3d1e"])
"""From a key that is not looked at to the one that gets everything, in steps of the square root."""

MOST_COLUMNS = 480
"""A longer context is drawn in so many bins, each as dark as its strongest token."""

WIDTH, LEFT, STRIP_WIDTH, STRIP, PITCH = 10.0, 1.45, 7.1, 0.26, 0.62  # inches
LEAST_SHOWN, MOST_NAMED, LONGEST, LETTER = 0.015, 40, 18, 0.066
"""The weight that a token of the context needs to be named; the live tokens of which all are named; the letters of a
name that are shown, and the inches that one takes."""


def reads(
    model: Model, text: str | Ids, *, token: int = -1, layers: Iterable[int] | None = None, labels: int = 4
) -> Figure:
    """What each Lyra head reads of the attached context at one token of a text: a strip a head.

    The darker a column, the more of the head's softmax that token of the context gets; up to `labels` of the strongest
    tokens are named. The bar at the right says how much goes to the context in all, of everything that the head looks
    at. `token` counts those of the text, BOS included; `layers` are by default all that read the context. Raises
    ModelError where no head reads one, IndexError for a token that is not there.
    """
    context, live = _texts(model, text)
    found = {layer: attention[:, token, :] for layer, attention in model.attentions(text, layers=layers).items()}
    rows = [
        (f"layer {layer} · head {head}", found[layer][head])
        for layer in found
        for head in model.spec.layer(layer).lyra_q_heads
    ]
    if not rows:
        raise ModelError(f"reads: no head of the layers {list(found)} reads the context")
    height = 0.9 + len(rows) * PITCH
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    norm = PowerNorm(0.5, vmin=0, vmax=max(row[: len(context)].max() for _, row in rows))
    _heading(figure, f"What each Lyra head reads of {len(context):,} tokens of context", _until(live, token))
    for index, (name, weights) in enumerate(rows):
        bottom = height - 0.78 - index * PITCH - STRIP
        axes = figure.add_axes((LEFT / WIDTH, bottom / height, STRIP_WIDTH / WIDTH, STRIP / height))
        _strip(axes, weights[: len(context)], norm)
        axes.text(-0.012, 0.5, name, transform=axes.transAxes, ha="right", va="center", color=INK, fontsize=9)
        _name_strongest(axes, weights[: len(context)], context, labels)
        _share(figure, (bottom / height, STRIP / height), float(weights[: len(context)].sum()))
    start = (LEFT + STRIP_WIDTH + 0.15) / WIDTH
    figure.text(start, 1 - 0.52 / height, "context", color=LYRA, fontsize=9, va="center")
    figure.text(start + 0.06, 1 - 0.52 / height, "live", color="#5b7da3", fontsize=9, va="center")
    return figure


def attention(model: Model, text: str | Ids, layer: int, head: int) -> Figure:
    """What one head looks at for every token of a text: a row for each, the context's columns, then the live ones.

    Raises ModelError where the layer reads no context, IndexError for a head that is not there.
    """
    context, live = _texts(model, text)
    weights = model.attentions(text, layers=[layer])[layer][head]
    slots = weights.shape[1] - weights.shape[0]
    if slots != len(context):
        raise ModelError(f"attention: layer {layer} reads no context; those that do are {list(model.attentions(text))}")
    height = 1.75 + max(1.2, 0.2 * len(live))
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    _heading(
        figure,
        f"Layer {layer}, head {head}: the context it reads, then the text itself",
        "a row for each token of the text; named are those of the context that get most in any row",
    )
    norm = PowerNorm(0.5, vmin=0, vmax=float(weights.max()))
    shares = np.array([max(slots, 1), max(len(live), slots / 6)], dtype=float)
    widths = shares / shares.sum() * (WIDTH - LEFT - 0.5)
    start, bottom = LEFT, 0.85
    for part, title, width in zip((weights[:, :slots], weights[:, slots:]), ("context", "text"), widths, strict=True):
        axes = figure.add_axes((start / WIDTH, bottom / height, width / WIDTH, (height - bottom - 0.9) / height))
        extent = (0, part.shape[1], len(live), 0)
        axes.imshow(_binned(part), aspect="auto", cmap=SHADES, norm=norm, interpolation="nearest", extent=extent)
        axes.set_title(title, fontsize=9, color=PALE, pad=3)
        axes.set(xticks=[], yticks=[])
        _frame(axes)
        start += width + 0.12
    before, after = figure.axes
    before.set_yticks(np.arange(len(live)) + 0.5, live, fontsize=8, color=INK)
    before.tick_params(length=0, pad=3)
    _name_strongest(before, weights[:, :slots].max(axis=0), context, 8)
    if len(live) <= MOST_NAMED:
        after.set_xticks(np.arange(len(live)) + 0.5, live, rotation=90, fontsize=8, color=INK)
        after.tick_params(length=0, pad=3)
    return figure


def _texts(model: Model, text: str | Ids) -> tuple[list[str], list[str]]:
    """The tokens of the attached context and of a text, as they are written. Raises ModelError."""
    if model.context is None:
        raise ModelError("plot: no context is attached; call model.attach(context) first")
    ids = np.asarray(model.text.encode(text) if isinstance(text, str) and model.text else text)
    if model.context.tokens is None:
        context = [f"slot {slot}" for slot in range(model.context.mask.shape[1])]
    else:
        context = _words(_written(model, model.context.tokens[0]))
    return context, [name.strip() or "␣" for name in _written(model, ids)]


def _written(model: Model, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Each token by itself; a space in front of it begins a word."""
    if model.text is None:
        return [f" {int(token)}" for token in ids]
    names = (model.text.tokenizer.id_to_token(int(token)) or f" {int(token)}" for token in ids)
    return [name.replace("▁", " ").replace("\n", "↵").replace("$", r"\$") for name in names]


def _words(names: Sequence[str]) -> list[str]:
    """For each token the word that it is a part of, so that a piece of one can be read."""
    starts = [
        index
        for index, name in enumerate(names)
        if index == 0 or not (name.isalnum() and names[index - 1][-1:].isalnum())
    ]
    words = []
    for start, stop in pairwise([*starts, len(names)]):
        words += ["".join(names[start:stop]).strip() or "␣"] * (stop - start)
    return words


def _until(live: Sequence[str], token: int) -> str:
    """The text up to the token that is asked about, its end at most."""
    words = live[: token % len(live) + 1]
    before = " ".join(words[-13:-1])
    return f"at the token “{words[-1]}” of: {'… ' if len(words) > 13 else ''}{before} {words[-1]}"


def _heading(figure: Figure, title: str, below: str) -> None:
    height = figure.get_size_inches()[1]
    figure.text(LEFT / WIDTH, 1 - 0.27 / height, title, color=INK, fontsize=12, weight="bold", va="center")
    figure.text(LEFT / WIDTH, 1 - 0.52 / height, below, color=PALE, fontsize=9, va="center")


def _binned(weights: np.ndarray) -> np.ndarray:
    """Columns [..., S] in at most MOST_COLUMNS bins, the strongest of each."""
    if weights.shape[-1] <= MOST_COLUMNS:
        return weights
    edges = np.linspace(0, weights.shape[-1], MOST_COLUMNS, endpoint=False).astype(int)
    return np.maximum.reduceat(weights, edges, axis=-1)


def _strip(axes: Axes, weights: np.ndarray, norm: PowerNorm) -> None:
    extent = (0, len(weights), 0, 1)
    axes.imshow(_binned(weights)[None], aspect="auto", cmap=SHADES, norm=norm, interpolation="nearest", extent=extent)
    axes.set(xticks=[], yticks=[])
    _frame(axes)


def _name_strongest(axes: Axes, weights: np.ndarray, names: Sequence[str], most: int) -> None:
    """Names below: the strongest tokens first, none where it would touch the name of a stronger one."""
    width, height = (pixels / axes.figure.dpi for pixels in (axes.bbox.width, axes.bbox.height))
    below = transforms.blended_transform_factory(axes.transData, axes.transAxes)
    taken: list[tuple[float, float]] = []  # inches
    for slot in map(int, np.argsort(-weights)):
        if len(taken) == most or weights[slot] < LEAST_SHOWN:
            break
        name = names[slot] if len(names[slot]) <= LONGEST else names[slot][: LONGEST - 1] + "…"
        text = f"{name}  {weights[slot]:.0%}"
        middle, half = (slot + 0.5) / len(weights) * width, LETTER * len(text) / 2
        start = min(max(middle - half, 0.0), width - 2 * half)
        if any(start < other[1] + LETTER and other[0] < start + 2 * half + LETTER for other in taken):
            continue
        taken.append((start, start + 2 * half))
        axes.plot([slot + 0.5] * 2, [-0.06 / height, 0], color=LYRA, lw=0.8, clip_on=False, transform=below)
        side = "left" if start == 0 else "right" if start == width - 2 * half else "center"
        place = {"left": 0, "center": slot + 0.5, "right": len(weights)}[side]
        axes.text(place, -0.08 / height, text, ha=side, va="top", color=INK, fontsize=8, transform=below)
    axes.set_xlim(0, len(weights))


def _share(figure: Figure, place: tuple[float, float], share: float) -> None:
    """A bar beside a strip: how much of the softmax goes to the context, the rest to live tokens."""
    start = (LEFT + STRIP_WIDTH + 0.15) / WIDTH
    axes = figure.add_axes((start, place[0] + place[1] * 0.22, 0.055, place[1] * 0.56))
    axes.barh(0, 1, color=LIVE, height=1)
    axes.barh(0, share, color=LYRA, height=1)
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5))
    axes.axis("off")
    axes.text(1.08, 0, f"{share:.0%}", ha="left", va="center", color=INK, fontsize=9)


def _frame(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set(color=GRID, linewidth=0.8)
