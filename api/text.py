"""Text to token ids and back: a tokenizer together with the ids that mean something to a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from lyra.spec.arguments import check_text
from lyra.spec.bos import with_one_bos
from lyra.spec.fingerprint import hash_vocabulary

from .errors import CheckpointError
from .special_ids import special_ids

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""What a tokenizer with byte fallback calls a byte."""


@dataclass(frozen=True)
class Text:
    """A tokenizer, the BOS that starts every text (None if the model has none), the ids that end one, and padding."""

    tokenizer: Tokenizer
    bos: int | None
    stops: tuple[int, ...]
    pad: int = 0

    @classmethod
    def from_folder(cls, folder: Path) -> Text | None:
        """The tokenizer of a model's folder; None where it has no tokenizer.json. Raises CheckpointError."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        tokenizer = read_tokenizer(path)
        return cls(tokenizer, *special_ids(folder, tokenizer))

    @property
    def fingerprint(self) -> str:
        """The hash of the vocabulary, to which tokens may have been added since it was last asked for."""
        size = self.tokenizer.get_vocab_size(with_added_tokens=True)
        if size not in self._hashes:
            self._hashes[size] = hash_vocabulary(self.tokenizer.get_vocab(with_added_tokens=True))
        return self._hashes[size]

    @cached_property
    def _hashes(self) -> dict[int, str]:
        return {}

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, BOS first, once: warns where the text starts with BOS itself.

        Raises InputError for what is no text.
        """
        return with_one_bos(self.tokenizer.encode(check_text("text", text)).ids, self.bos)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids, up to the first that ends a text; special tokens are left out."""
        return self.tokenizer.decode(self.until_stop(ids), skip_special_tokens=True)

    def until_stop(self, ids: Iterable[int]) -> list[int]:
        """The ids before the first that ends a text."""
        kept: list[int] = []
        for token in ids:
            if int(token) in self.stops:
                break
            kept.append(int(token))
        return kept

    def left_padded(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray | None]:
        """Rows as ids [B,T] with the padding on the left, and the mask [B,T], None where there is no padding."""
        length = max(len(row) for row in rows)
        ids = np.full((len(rows), length), self.pad, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=bool)
        for index, row in enumerate(rows):
            ids[index, length - len(row) :] = row
            mask[index, length - len(row) :] = True
        return ids, None if mask.all() else mask


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file, which takes whole texts: files may keep a truncation or padding from their last use.

    Raises CheckpointError, also where it encodes no text: a part that contradicts another shows only then.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("a")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare Exception, or PanicException, which is none
        raise CheckpointError(f"{path} is no tokenizer ({error!s:.200})") from None
    return tokenizer


class TextStream:
    """Turns generated ids, one at a time, into pieces of text that end between characters.

    Ids that stand for one byte each are kept back until another id follows: only then is it known whether all of them
    together are UTF-8, without which every one of them becomes a replacement character.
    """

    def __init__(self, text: Text) -> None:
        self._text = text
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._pieces: list[str] = []
        self._kept: list[int] = []
        self._stopped = False

    def step(self, token: int) -> str:
        """The text that this id completes, perhaps none yet; none after an id that ends the text."""
        self._stopped = self._stopped or token in self._text.stops
        if self._stopped:
            return ""
        self._kept.append(token)
        if BYTE.fullmatch(self._text.tokenizer.id_to_token(token) or ""):
            return ""
        piece = self._decoder.step(self._text.tokenizer, self._kept) or ""
        self._kept = []
        self._pieces.append(piece)
        return piece

    def rest(self, whole: str) -> str:
        """What is left of the whole text: bytes that no other id followed, as characters."""
        return whole.removeprefix("".join(self._pieces))
