"""Text that comes token by token is the text of all tokens together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lyra.text import Text, TextStream


@pytest.fixture(scope="module")
def text(tiny_folder: Path) -> Text:
    """The tokenizer of the tiny model: 256 bytes and a few words."""
    found = Text.from_folder(tiny_folder)
    assert found is not None
    return found


def in_pieces(text: Text, ids: list[int]) -> list[str]:
    stream = TextStream(text)
    pieces = [stream.step(token) for token in ids]
    return [*pieces, stream.rest(text.decode(ids))]


def test_pieces_join_to_the_whole_whatever_the_tokens(text: Text) -> None:
    """Random bytes too, which are no UTF-8 or only up to some byte: a model may draw anything."""
    rng = np.random.default_rng(0)
    words = [text.tokenizer.token_to_id(word) for word in ("▁the", "and", "o", "▁▁", "<note>")]
    bytes_ = [
        text.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in (0x1C, 0x41, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xFF)
    ]
    for _ in range(400):
        ids = rng.choice(words + bytes_, size=rng.integers(1, 12)).tolist()
        assert "".join(in_pieces(text, ids)) == text.decode(ids), ids


def test_words_come_at_once_and_bytes_when_a_word_follows(text: Text) -> None:
    ids = [text.tokenizer.token_to_id(one) for one in ("▁the", "and", "<0xC3>", "<0xA9>", "o", "<0x41>")]
    assert in_pieces(text, ids) == [" the", "and", "", "", "éo", "", "A"]
