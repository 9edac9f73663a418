"""lyra.plot: what is drawn is what the heads look at, and the names are those of the strongest tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import lyra
import lyra.plot
from lyra.spec import HeadSplit

TEXT, CONTEXT, CUT = "and the end", "the other and the end of the note", HeadSplit((1, 3), share_kv=True)


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    """The tiny model with a context of some words."""
    made = lyra.load(tiny_folder)
    made.attach(made.capture(CONTEXT), CUT)
    return made


def strips(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images]


def image(axes: Axes) -> np.ndarray:
    return np.asarray(axes.images[0].get_array())


def written(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_strip_for_each_lyra_head_that_reads(model: Any, tmp_path: Path) -> None:
    slots, weights = model.context.num_tokens, model.attentions(TEXT)
    figure = lyra.plot.reads(model, TEXT)
    drawn = strips(figure)
    assert [written(axes)[0] for axes in drawn] == [
        f"layer {layer} · head {head}" for layer in (1, 3) for head in (1, 3)
    ]
    expected = [weights[layer][head, -1] for layer in (1, 3) for head in (1, 3)]
    for axes, row in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(image(axes)[0], row[:slots])
        strongest = int(row[:slots].argmax())
        assert written(axes)[1].endswith(f"  {row[strongest]:.0%}")
    shares = [written(axes)[0] for axes in figure.axes if not axes.images]
    assert shares == [f"{row[:slots].sum():.0%}" for row in expected]
    earlier = lyra.plot.reads(model, TEXT, token=1, layers=[3], labels=2)
    np.testing.assert_array_equal(image(strips(earlier)[0])[0], weights[3][1, 1, :slots])
    assert all(len(written(axes)) <= 3 for axes in strips(earlier))
    figure.savefig(tmp_path / "reads.png")
    assert (tmp_path / "reads.png").stat().st_size > 5_000


def test_one_head_over_context_and_text(model: Any) -> None:
    slots, weights = model.context.num_tokens, model.attentions(TEXT)[3][1]
    context, live = lyra.plot.attention(model, TEXT, 3, 1).axes
    np.testing.assert_array_equal(image(context), weights[:, :slots])
    np.testing.assert_array_equal(image(live), weights[:, slots:])
    assert context.get_yticklabels()[0].get_text() == "<bos>"
    assert len(context.get_yticklabels()) == len(live.get_xticklabels()) == len(weights)


def test_a_long_context_is_drawn_in_bins_and_words_stand_whole() -> None:
    weights = np.random.default_rng(0).random(1_000)
    binned = lyra.plot._binned(weights)
    assert len(binned) == lyra.plot.MOST_COLUMNS
    assert binned.max() == weights.max()
    assert lyra.plot._words(["<bos>", " The", " hel", "iot", "rope", ".", "↵", " "]) == [
        "<bos>", "The", "heliotrope", "heliotrope", "heliotrope", ".", "↵", "␣",
    ]  # fmt: skip


def test_contexts_without_tokens_and_models_without_text(model: Any) -> None:
    ids = model.text.encode(TEXT)
    model.attach(replace(model.context, tokens=None), CUT)
    assert "slot " in written(strips(lyra.plot.reads(model, ids))[0])[1]
    bare = lyra.Model(model.engine)
    bare.attach(model.context, CUT)
    assert [label.get_text() for label in lyra.plot.attention(bare, ids, 1, 1).axes[0].get_yticklabels()] == list(
        map(str, ids)
    )


def test_refusals(model: Any) -> None:
    with pytest.raises(lyra.ModelError, match=r"no head of the layers \[0\] reads the context"):
        lyra.plot.reads(model, TEXT, layers=[0])
    with pytest.raises(lyra.ModelError, match=r"layer 0 reads no context; those that do are \[1, 3\]"):
        lyra.plot.attention(model, TEXT, 0, 1)
    model.detach()
    with pytest.raises(lyra.ModelError, match=r"call model\.attach"):
        lyra.plot.reads(model, TEXT)
