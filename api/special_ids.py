"""The token ids that mean something to a model: the BOS, every token that ends a generation, and the padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from lyra.backends.checkpoint import check_ids, read_config
from lyra.spec.text_file import read_json

from .errors import CheckpointError

GENERATION, TOKENIZER_FILES = "generation_config.json", ("tokenizer_config.json", "special_tokens_map.json")
ENDS = frozenset(
    {
        "<end_of_turn>", "<eos>", "</s>", "<EOT>", "_<EOT>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
        "<|end_of_text|>", "<|endoftext|>", "<|end_of_turn|>", "<turn|>",
    }
)  # fmt: skip
"""Special tokens that end a turn or a text by their spelling, whatever a file forgets to say of them."""


class SpecialIds(NamedTuple):
    """The BOS that starts every text (None if the model has none), the ids that end one, ascending, and the padding."""

    bos: int | None
    stops: tuple[int, ...]
    pad: int


def special_ids(folder: Path, tokenizer: Tokenizer) -> SpecialIds:
    """What the files of a model's folder say of its special tokens, all of them taken together.

    A text ends at every token that config.json, generation_config.json, tokenizer_config.json or
    special_tokens_map.json call the end, and at the tokenizer's special tokens of ENDS, which chat templates write
    behind a turn. Raises CheckpointError for ids outside the vocabulary.
    """
    config = read_config(folder)
    generation = _json(folder / GENERATION)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        check_ids(folder / GENERATION, name, generation.get(name), config.spec.vocab_size)
    named = [owner["eos_token_id"] for owner in (config.special, generation) if owner.get("eos_token_id") is not None]
    stops = {stop for ids in named for stop in (ids if isinstance(ids, list) else [ids])}
    spelled = set(_end_tokens(folder)) | _special_ends(tokenizer)
    stops |= {index for text in spelled if (index := tokenizer.token_to_id(text)) is not None}
    bos = generation.get("bos_token_id")
    return SpecialIds(
        bos=config.special["bos_token_id"] if bos is None else bos,
        stops=tuple(sorted(stop for stop in stops if stop < config.spec.vocab_size)),
        pad=generation.get("pad_token_id") or config.special["pad_token_id"] or 0,
    )


def _end_tokens(folder: Path) -> Iterator[str]:
    """The EOS by its text, as the tokenizer's files name it."""
    for name in TOKENIZER_FILES:
        found: Any = _json(folder / name).get("eos_token")
        text = found.get("content") if isinstance(found, Mapping) else found
        if text is None:
            continue
        if not isinstance(text, str):
            raise CheckpointError(f"{folder / name}: eos_token is {found!r:.100}; expected the text of a token")
        yield text


def _special_ends(tokenizer: Tokenizer) -> set[str]:
    added = tokenizer.get_added_tokens_decoder().values()
    return {token.content for token in added if token.special and token.content in ENDS}


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, refuse=CheckpointError)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
