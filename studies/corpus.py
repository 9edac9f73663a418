"""Text to train on: paragraphs, tokens, the part that is held out, and the order in which windows are drawn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from tokenizers import ByteLevelBPETokenizer

from lyra.spec.errors import InputError

HELD_OUT = 0.1
"""The last tenth of a text is never trained on."""

BYTES = 256


@dataclass(frozen=True)
class Corpus:
    """Tokens int64 to train on and held out; bytes of text that one held-out token stands for; what identifies it."""

    name: str
    vocab_size: int
    train: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float
    digest: str


def read_corpus(path: Path | None, vocab_size: int, window: int) -> Corpus:
    """A text in tokens: `path`, or Python's own documentation in pydoc_data where none is given.

    Each paragraph counts once, so that nothing held out has been trained on. vocab_size 256 means bytes; more a
    byte-level BPE that is trained on the part for training. Raises InputError for a text without room for windows of
    `window` tokens, OSError.
    """
    if vocab_size < BYTES:
        raise InputError(f"the vocabulary has {vocab_size} tokens; expected {BYTES}, which are bytes, or more")
    text = once(default_text() if path is None else path.read_text(encoding="utf-8", errors="replace"))
    cut = int(len(text) * (1 - HELD_OUT))
    parts = text[:cut], text[cut:]
    if vocab_size == BYTES:
        train, held_out = (np.frombuffer(part.encode(), np.uint8).astype(np.int64) for part in parts)
    else:
        tokenizer = byte_pairs(parts[0], vocab_size)
        vocab_size = tokenizer.get_vocab_size()  # a short text has fewer pairs
        train, held_out = (np.array(tokenizer.encode(part).ids, np.int64) for part in parts)
    if len(held_out) <= window:
        raise InputError(
            f"the text holds out {len(held_out)} tokens, its last tenth; expected more than one window of {window}. "
            f"Give a longer text or shorter windows"
        )
    size = len(parts[1].encode()) / len(held_out)
    name = "pydoc_data.topics" if path is None else path.name
    digest = hashlib.sha256(f"{vocab_size}\n{text}".encode()).hexdigest()
    return Corpus(name, vocab_size, train, held_out, size, digest)


def default_text() -> str:
    """A text in English that comes with every Python: its language reference, by topic."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def once(text: str) -> str:
    """The text without the paragraphs that it has had before."""
    return "\n\n".join(dict.fromkeys(text.split("\n\n")))


def byte_pairs(text: str, vocab_size: int) -> ByteLevelBPETokenizer:
    """A byte-level BPE tokenizer trained on a text: it knows every byte, so it tokenises any text."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(iter([text]), vocab_size, min_frequency=0, show_progress=False)
    return tokenizer


def batch(tokens: np.ndarray, seed: int, step: int, rows: int, window: int) -> np.ndarray:
    """The windows [rows, window + 1] of one step: a function of seed and step, so that any step can be the next."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - window, rows)
    return sliding_window_view(tokens, window + 1)[starts]


def windows(tokens: np.ndarray, window: int) -> np.ndarray:
    """All of a text in windows [N, window + 1] that predict every token but the first and the last few once."""
    return sliding_window_view(tokens, window + 1)[::window].copy()
