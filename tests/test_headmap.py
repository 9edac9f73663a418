"""The head map as a picture: what it shows, that nothing is cut off, and how it refuses."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lyra.cli import application
from lyra.spec import AttentionSpec, HeadSplit, ModelSpec, StaticSpec

mpl = pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from lyra.cli.headmap import GLOBAL, LYRA, SLIDING, VANILLA, draw  # noqa: E402
from lyra.cli.splits_by_layer import draw_layers  # noqa: E402


def layer(query_heads: int, kv_heads: int, heads: tuple[int, ...], **fields: object) -> AttentionSpec:
    split = HeadSplit(lyra_q_heads=heads, share_kv=True)
    shape = {"hidden_size": 64, "head_dim": 16, "scale": 0.25}
    return AttentionSpec(
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        split=split,
        **shape,
        **fields,  # type: ignore[arg-type]
    )


def colours(attention: AttentionSpec, model: ModelSpec | None = None) -> Counter[str]:
    """How many boxes have each colour, the legend's left out."""
    (axes,) = draw("a name", attention, model).axes
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return Counter(to_hex(box.get_facecolor()) for box in boxes if box.get_fill() and box.get_height() != 0.2)


def test_every_head_has_its_colour() -> None:
    found = colours(layer(16, 8, tuple(range(8, 16))))
    assert found == {LYRA[0]: 8 + 4, VANILLA[0]: 8 + 4}
    assert colours(layer(4, 1, (0, 3))) == {LYRA[0]: 2 + 1, VANILLA[0]: 2 + 1}
    assert colours(layer(4, 2, ())) == {VANILLA[0]: 4 + 2}


def test_every_layer_of_the_model_is_drawn() -> None:
    model = ModelSpec.preset("gemma-3-270m")
    attention = model.attention.replace(split=HeadSplit.all(model))
    assert colours(attention, model) == {LYRA[0]: 4 + 1 + 3, SLIDING: 15}
    assert LYRA[0] == GLOBAL
    without = model.attention.replace(split=HeadSplit.none())
    assert colours(without, model) == {VANILLA[0]: 4 + 1 + 3, SLIDING: 15}


@pytest.mark.parametrize("shape", [(16, 8), (4, 1), (64, 8), (64, 1), (64, 64), (1, 1)])
@pytest.mark.parametrize("preset", [None, "gemma-3-27b"])
def test_no_words_are_cut_off_and_none_overlap(shape: tuple[int, int], preset: str | None) -> None:
    model = ModelSpec.preset(preset) if preset else None
    heads = tuple(range(0, shape[0], 3))
    figure = draw("a-model-with-quite-a-long-name", layer(*shape, heads), model)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page = figure.bbox
    (axes,) = figure.axes
    extents = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in axes.texts]
    for words, extent in extents:
        assert page.x0 <= extent.x0 < extent.x1 <= page.x1, words
        assert page.y0 <= extent.y0 < extent.y1 <= page.y1, words
    for place, (words, extent) in enumerate(extents):
        assert [other for other, box in extents[:place] if extent.overlaps(box)] == [], words


@pytest.mark.parametrize(
    ("live", "words"),
    [("causal", "and the live tokens"), ("self", "and its own token"), ("none", "the static context only")],
)
def test_the_words_say_what_lyra_heads_see(live: str, words: str) -> None:
    (axes,) = draw("a", layer(4, 2, (2, 3), static=StaticSpec(live=live)), None).axes
    assert [one for one in (text.get_text() for text in axes.texts) if one.startswith("Lyra: ") and words in one]


def test_layers_with_splits_of_their_own_stand_in_lines() -> None:
    model = ModelSpec.preset("gemma-3-4b")
    chosen = {5: HeadSplit((0, 1)), 17: HeadSplit((7,), share_kv=True)}
    (axes,) = draw_layers(model.with_split(chosen)).axes
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_height() != 0.2]
    assert Counter(to_hex(box.get_facecolor()) for box in boxes) == {LYRA[0]: 3, VANILLA[0]: 8 * 5 - 3}
    words = [text.get_text() for text in axes.texts]
    assert "3 of 40 query heads go to Lyra; 2 of them read a KV head" in words
    assert [word for word in words if word.startswith("layer ")] == [f"layer {layer}" for layer in model.global_layers]


def split(*arguments: object) -> Result:
    words = ["split", *map(str, arguments)]
    return CliRunner().invoke(application(), words, env={"COLUMNS": "100", "NO_COLOR": "1"})


def test_the_command_writes_both_files(tmp_path: Path) -> None:
    svg, png = tmp_path / "map.svg", tmp_path / "map.png"
    done = split("gemma-3-12b", "--lyra-kv", 4, "--svg", svg, "--png", png)
    assert done.exit_code == 0, done.output
    words = re.findall(r"<!-- (.*?) -->", svg.read_text())
    assert "gemma-3-12b: 8 of 16 query heads go to Lyra" in words
    assert [f"KV {head}" for head in range(8)] == [word for word in words if re.fullmatch(r"KV \d", word)]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.png", "map.svg"]
    before = svg.read_bytes()
    split("gemma-3-12b", "--lyra-kv", 4, "--svg", svg)
    assert svg.read_bytes() == before


def test_the_command_shows_splits_by_layer(tmp_path: Path) -> None:
    file, png = tmp_path / "split.toml", tmp_path / "map.png"
    model = ModelSpec.preset("gemma-3-4b")
    model.with_split({5: HeadSplit((0, 1)), 17: HeadSplit((7,), share_kv=True)}).to_toml(file)
    done = split("gemma-3-4b", "--split", file, "--png", png, "--json", tmp_path / "map.json")
    assert done.exit_code == 0, done.output
    assert done.output == split(file).output
    lines = [line.rstrip() for line in done.output.splitlines()]
    assert "queries  0 1 │ 2 3 │ 4 5 │ 6 7" in lines
    assert "layer 5  L L │ v v │ v v │ v v" in lines
    assert "layer 17 v v │ v v │ v v │ v L" in lines
    assert "3.9 MiB per 1,000 tokens" in done.output
    found = json.loads((tmp_path / "map.json").read_text())
    assert found["static_cache_bytes_per_1000_tokens"] == 2 * 2 * 256 * 4 * 1000
    assert found["layers"][0] == {"layer": 5, "lyra_q_heads": [0, 1], "lyra_kv_heads": [0], "cut_kv_heads": []}
    assert not found["kv_aligned"]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_split_of_another_model_is_refused() -> None:
    done = split("gemma-3-270m", "--split", "gemma-3-12b-lyra-8q4kv")
    assert done.exit_code == 2
    assert "splits layers of (16, 8) query and KV heads" in done.stderr


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> str:
        done = split("gemma-3-12b", *arguments)
        assert done.exit_code == 2
        assert done.stdout == ""
        return done.stderr

    assert "the name must end in .svg" in refused("--svg", tmp_path / "map.pdf")
    assert "there is no folder" in refused("--png", tmp_path / "nowhere" / "map.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "studies" in refused("--png", tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []
