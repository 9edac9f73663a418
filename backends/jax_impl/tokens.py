"""Token ids and their mask on the way into a model, and their way back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lyra.spec.arguments import check_ids, check_mask

from .cache import bucket

CHUNK = 512
"""Tokens a row that one compiled prefill call takes at most."""


class Tokens(NamedTuple):
    """Checked tokens: ids int32 [B,T], mask bool [B,T] with False for padding."""

    ids: np.ndarray
    mask: np.ndarray


class Packed(NamedTuple):
    """Tokens whose padding is on the left, in a width that few compiled functions serve.

    ids int32 [B,N], mask bool [B,N]; source int [B,T]: the column that a token of the caller's ids now stands in.
    """

    ids: np.ndarray
    mask: np.ndarray
    source: np.ndarray


def check_tokens(ids: np.ndarray, mask: np.ndarray | None, vocab_size: int) -> Tokens:
    """Check ids [B,T] and mask [B,T] (bool, False = padding) and fill in an absent mask. Raises InputError."""
    ids = check_ids(ids, vocab_size)
    return Tokens(ids.astype(np.int32), check_mask(mask, ids.shape))


def padded_width(tokens: int, chunk: int = CHUNK) -> int:
    """The width that `tokens` tokens are padded to: a power of two up to `chunk`, then whole chunks."""
    return min(bucket(tokens), chunk) if tokens <= chunk else -(-tokens // chunk) * chunk


def pack_left(tokens: Tokens, chunk: int = CHUNK) -> Packed:
    """Move every row's real tokens to the right end, in their order, behind padding.

    Then they stand side by side whatever the mask was, the last one in the last column. Clause POSITION-4.
    """
    batch, length = tokens.ids.shape
    width = padded_width(length, chunk)
    order = np.argsort(tokens.mask, axis=1, kind="stable")
    ids, mask = np.zeros((batch, width), np.int32), np.zeros((batch, width), bool)
    ids[:, width - length :] = np.take_along_axis(tokens.ids, order, axis=1)
    mask[:, width - length :] = np.take_along_axis(tokens.mask, order, axis=1)
    return Packed(ids, mask, np.argsort(order, axis=1, kind="stable") + width - length)
