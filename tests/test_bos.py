"""A text has one BOS: what a chat template writes is no second one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

import lyra
from lyra import InputError, Model, StaticContext, TextWarning
from lyra.cli import application
from lyra.spec.bos import leading_bos, with_one_bos
from lyra.text import Text

PLAIN = "the hand and"
TWICE = "the text starts with BOS itself and every text gets one, which makes {}: one is kept"


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    """In one backend: none of them sees a text."""
    return lyra.load(tiny_folder)


def warned(call: Callable[[], Any], message: str) -> Any:
    """What the call gives; it warns once, at the line of the test."""
    with pytest.warns(TextWarning, match=message) as caught:
        found = call()
    assert [Path(one.filename).name for one in caught] == [Path(__file__).name]
    return found


def quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_text_that_starts_with_bos_is_the_text_without(model: Model, times: int) -> None:
    assert model.tokenizer.encode("<bos>").ids.count(2) > 0, "this tokenizer reads BOS in a text"
    text, message = "<bos>" * times + PLAIN, TWICE.format(times + 1)
    plain = quietly(lambda: model.score(PLAIN))
    np.testing.assert_array_equal(warned(lambda: model.score(text), message).nll, plain.nll)
    if times == 1:
        np.testing.assert_array_equal(warned(lambda: model.logits(text), message), model.logits(PLAIN))
        assert warned(lambda: model.generate(text, 4), message) == model.generate(PLAIN, 4)
        assert warned(lambda: model.generate([PLAIN, text], 4), message) == model.generate([PLAIN, PLAIN], 4)
        context = warned(lambda: model.capture(text), message)
        assert context.tokens.tolist() == quietly(lambda: model.capture(PLAIN)).tokens.tolist()


def test_bos_further_on_is_part_of_the_text(model: Model) -> None:
    ids = quietly(lambda: model.text.encode(f"{PLAIN}<bos>{PLAIN}"))
    assert ids.count(2) == 2


def test_ids_are_taken_as_they_are(model: Model) -> None:
    once, twice = [2, 270, 271], [2, 2, 270, 271]
    quietly(lambda: model.score(once))
    quietly(lambda: model.logits([once, once]))
    message = r"the ids start with 2 BOS tokens \(id 2\) and are taken as they are; models expect one"
    assert warned(lambda: model.score(twice), message).num_tokens == 3
    assert warned(lambda: model.capture(twice), message).tokens.tolist() == [twice]
    assert warned(lambda: model.logits([[2, 270, 271, 270], twice]), message).shape[:2] == (2, 4)


@pytest.mark.parametrize(
    ("ids", "bos", "expected"),
    [
        ([5, 6], 2, [2, 5, 6]),
        ([2, 5, 6], 2, [2, 5, 6]),
        ([], 2, [2]),
        ([5, 2, 2], 2, [2, 5, 2, 2]),
        ([2, 2, 5], None, [2, 2, 5]),
        ([], None, []),
    ],
)
def test_one_bos_is_put_in_front_where_there_is_none(ids: list[int], bos: int | None, expected: list[int]) -> None:
    assert quietly(lambda: with_one_bos(ids, bos)) == expected


def test_two_are_one_too_many() -> None:
    assert warned(lambda: with_one_bos([2, 2, 2, 5], 2), "which makes 3: one is kept, 2 dropped") == [2, 5]
    assert leading_bos([2, 2, 5, 2], 2) == 2


def test_a_tokenizer_that_adds_no_bos_may_read_one(tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    text = Text(tokenizer, bos=2, stops=(1,))
    tokenizer.post_processor = None  # type: ignore[assignment]
    if tokenizer.encode(PLAIN).ids[0] == 2:
        pytest.skip("this version of tokenizers keeps the post-processor")
    assert quietly(lambda: text.encode(f"<bos>{PLAIN}")) == quietly(lambda: text.encode(PLAIN))


def test_half_a_character_is_no_text_for_a_tokenizer(tiny_folder: Path) -> None:
    text = Text(Tokenizer.from_file(str(tiny_folder / "tokenizer.json")), bos=2, stops=(1,))
    with pytest.raises(InputError, match="half of a surrogate pair"):
        text.encode("a\ud800")


def test_composing_leaves_no_bos_in_the_middle(model: Model) -> None:
    """Contexts that hold several, from before or of ids given by hand, lose all of them behind another context."""
    first = model.capture(PLAIN)
    with pytest.warns(TextWarning):
        second = model.capture([2, 2, 2, 270, 271])
    both = first + second
    assert both.tokens.tolist() == [[*first.tokens[0], 270, 271]]
    assert both.positions.tolist() == [list(range(both.tokens.shape[1]))]
    np.testing.assert_array_equal(both.layers[1].k[:, :, -2:], second.layers[1].k[:, :, -2:])
    with_two: StaticContext = second + first
    assert with_two.tokens.tolist() == [[2, 2, 2, 270, 271, *first.tokens[0, 1:]]]


@pytest.mark.parametrize("command", ["score", "capture", "generate"])
def test_the_command_line_says_so_in_a_line(command: str, tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(f"<bos>{PLAIN}", encoding="utf-8")
    given = {
        "score": [str(text)],
        "capture": [str(text), str(tmp_path / "book.safetensors")],
        "generate": [f"<bos>{PLAIN}", "-n", "2"],
    }[command]
    done = CliRunner().invoke(application(), [command, *given, "--model", str(tiny_folder)])
    assert done.exit_code == 0, done.output
    assert f"warning: {TWICE.format(2)}" in done.stderr
    assert "TextWarning" not in done.stderr
