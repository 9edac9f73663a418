"""The BOS token, which starts a text once (clauses CAPTURE-1, COMPOSE-2)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from itertools import takewhile

from .errors import TextWarning


def leading_bos(ids: Iterable[int], bos: int | None) -> int:
    """How many BOS tokens a text starts with."""
    return sum(1 for _ in takewhile(lambda token: token == bos, ids)) if bos is not None else 0


def with_one_bos(ids: Sequence[int], bos: int | None) -> list[int]:
    """The ids of a text with one BOS in front, whether its tokenizer gives none, one, or one more than the text has.

    Warns where there were several. A chat template writes BOS into the text, for example.
    """
    count = leading_bos(ids, bos)
    if count > 1:
        _warn(f"the text starts with BOS itself and every text gets one, which makes {count}: one is kept, {count - 1} "
              f"dropped. Leave BOS out of the text")  # fmt: skip
    return list(ids) if bos is None else [bos, *ids[count:]]


def warn_of_repeated_bos(rows: Iterable[Sequence[int]], bos: int | None) -> None:
    """Warn of rows of ids, taken as they are, that start with more than one BOS."""
    most = max((leading_bos(row, bos) for row in rows), default=0)
    if most > 1:
        _warn(f"the ids start with {most} BOS tokens (id {bos}) and are taken as they are; models expect one")


def _warn(message: str) -> None:
    """Warn at the line outside Lyra that has called it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "lyra":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, TextWarning, stacklevel=level)
