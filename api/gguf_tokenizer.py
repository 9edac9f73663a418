"""The tokenizer that a .gguf file describes by a SentencePiece vocabulary, built with `tokenizers` alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from .errors import CheckpointError
from .gguf_parts import GGUFModel
from .special_ids import ENDS

SPACE = "▁"
CONTROL, USER_DEFINED = 3, 4
"""Values of tokenizer.ggml.token_type: special tokens, and tokens that text always matches whole."""

SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Names in tokenizer_config.json and under `tokenizer.ggml.` of the special tokens."""


def build_tokenizer(file: GGUFModel) -> Tokenizer:
    """The tokenizer of a file; it puts the BOS in front where the file says so.

    Raises CheckpointError where the file holds no SentencePiece vocabulary, or one that is not that of its model.
    """
    check_vocabulary(file)
    metadata = file.metadata
    names = special_tokens(metadata)
    pieces: list[str] = metadata["tokenizer.ggml.tokens"]
    tokens = [_respell(piece) for piece in pieces]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab, merges=derive_merges(tokens), unk_token=names["unk_token"], fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    kinds = metadata.get("tokenizer.ggml.token_type", ())
    special = [piece for piece, kind in zip(pieces, kinds, strict=False) if kind == CONTROL]
    special += [name for name in names.values() if name is not None and name not in special]
    whole = [piece for piece, kind in zip(pieces, kinds, strict=False) if kind == USER_DEFINED and piece in vocab]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in whole])
    if metadata.get("tokenizer.ggml.add_bos_token", True) and names["bos_token"] is not None:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer


def check_vocabulary(file: GGUFModel) -> None:
    """It is a SentencePiece vocabulary, a list of texts, no longer than the embedding; the special ids lie in it.

    Raises CheckpointError, naming the field.
    """
    kind = file.metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind != "llama" or "tokenizer.ggml.tokens" not in file.metadata:
        raise CheckpointError(
            f"{file.path} holds no SentencePiece vocabulary (tokenizer.ggml.model is {kind!r:.100}; expected 'llama')"
        )
    pieces, kinds = (file.metadata.get(f"tokenizer.ggml.{name}", []) for name in ("tokens", "token_type"))
    rows = file.tensors["token_embd.weight"].shape[0]

    def wrong(field: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{file.path}: tokenizer.ggml.{field} is {value!r:.100}; expected {expected}")

    if not isinstance(pieces, list) or not pieces or not all(isinstance(piece, str) for piece in pieces):
        raise wrong("tokens", pieces, "a list of texts")
    if len(pieces) > rows:
        raise wrong("tokens", f"{len(pieces):,} texts", f"one for each of the {rows:,} rows of token_embd.weight")
    if not isinstance(kinds, list | np.ndarray) or len(kinds) not in (0, len(pieces)):
        raise wrong("token_type", kinds, f"one kind for each of {len(pieces):,} tokens")
    ends = ("eot_token_id", "eom_token_id")
    for field in (*SPECIAL_KEYS.values(), *ends):
        value = file.metadata.get(f"tokenizer.ggml.{field}", 0)
        if type(value) is not int or not 0 <= value < len(pieces):
            raise wrong(field, value, f"an id from 0 to {len(pieces) - 1:,}")
    if not isinstance(file.metadata.get("tokenizer.chat_template", ""), str):
        raise CheckpointError(f"{file.path}: tokenizer.chat_template is no text")
    add_bos = file.metadata.get("tokenizer.ggml.add_bos_token", True)
    if type(add_bos) is not bool:
        raise wrong("add_bos_token", add_bos, "true or false")


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json says beside tokenizer.json: special tokens by name, and the chat template if any."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        **special_tokens(metadata),
    }
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str | None]:
    """The texts of the BOS, EOS, unknown and padding tokens, None where the file names none."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in SPECIAL_KEYS.items()}
    return {name: None if index is None else tokens[index] for name, index in ids.items()}


def control_ends(metadata: Mapping[str, Any]) -> list[int]:
    """The ids of control tokens that are spelled like the end of a turn or of a text."""
    pieces, kinds = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", ())
    both = enumerate(zip(pieces, kinds, strict=False))
    return [index for index, (piece, kind) in both if kind == CONTROL and piece in ENDS]


def derive_merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """The merges that a vocabulary in merge order implies: every cut of a token into two tokens.

    Earlier tokens merge first; of one token's cuts, the one with the longest left part. Scores need not follow the
    merge order (Gemma's do not), the order of the vocabulary does.
    """
    known = set(tokens)
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in known and token[cut:] in known
    ]


def _respell(piece: str) -> str:
    """Runs of spaces are stored as spaces, while the normaliser turns every space of a text into ▁."""
    return SPACE * len(piece) if " " in piece and not piece.strip() else piece
