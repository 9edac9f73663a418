"""The texts that heads are chosen and judged on: a context, and what is scored behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lyra.spec.errors import InputError

Kind = Literal["continuation", "recall", "passkey"]
KINDS: tuple[Kind, ...] = ("continuation", "recall", "passkey")
"""What is scored: the text that follows the context, the context's own text again, pass keys hidden in it."""

CHOOSING = ("typesmapping", "customization", "assignment")
HELD_OUT = ("types", "formatstrings", "string-methods", "typesseq", "debugger", "attribute-access")
"""The entries of `pydoc_data.topics`, which comes with every Python, that are used where no texts are given."""

EVERY = 3
"""Of given texts every third is held out."""

Encode = Callable[[str], list[int]]
"""Text to token ids, BOS first."""


@dataclass(frozen=True)
class Passage:
    """Ids that are run behind a context, BOS first, of which the last `scored` are scored."""

    kind: Kind
    ids: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Document:
    """The ids of a context, BOS first, and the passages that are scored behind it."""

    name: str
    context: tuple[int, ...]
    passages: tuple[Passage, ...]

    @cached_property
    def digest(self) -> str:
        """What tells it from other documents of the same name."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def default_texts() -> tuple[dict[str, str], dict[str, str]]:
    """Texts to choose on and to hold out, by name, from the language reference of the running Python."""
    from pydoc_data.topics import topics

    return {name: topics[name] for name in CHOOSING}, {name: topics[name] for name in HELD_OUT}


def set_apart(
    texts: Mapping[str, str] | Sequence[str] | None, held_out: Mapping[str, str] | Sequence[str] | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Texts to choose on and texts held out, by name, none of them in both.

    Without `held_out` every third text is held out, at least one, the last of them. Raises InputError for a single text
    and for one that is on both sides.
    """
    if texts is None:
        if held_out is None:
            return default_texts()
        return default_texts()[0], _named(held_out)
    found = _named(texts)
    if held_out is not None:
        apart = _named(held_out)
        both = sorted(name for name, text in apart.items() if text in found.values())
        if both:
            raise InputError(f"held-out texts {both} are also chosen on; a text can only serve as one of the two")
        return found, apart
    if len(found) < 2:
        raise InputError(
            f"{len(found)} text was given; give two or more, since some are held out, or name held-out ones"
        )
    names = list(found)
    kept = names[EVERY - 1 :: EVERY] or names[-1:]
    return {name: found[name] for name in names if name not in kept}, {name: found[name] for name in kept}


def cut(name: str, ids: Sequence[int], context_tokens: int, live_tokens: int) -> Document:
    """A document of a text's ids, BOS first: a context, the tokens that follow it, and the context's first ones again.

    Raises InputError for a text that is too short.
    """
    needed = context_tokens + live_tokens
    if len(ids) < needed:
        raise InputError(
            f"the text {name!r} has {len(ids)} tokens; a context of {context_tokens} and {live_tokens} more need "
            f"{needed}: give longer texts, or ask for a shorter context"
        )
    context = tuple(ids[:context_tokens])
    live: dict[Kind, Sequence[int]] = {
        "continuation": ids[context_tokens:needed],
        "recall": ids[1 : min(live_tokens, context_tokens)],
    }
    passages = tuple(Passage(kind, (ids[0], *scored), len(scored)) for kind, scored in live.items())
    return Document(name, context, passages)


def _named(texts: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    if isinstance(texts, str):
        raise InputError("texts is a single string; give a list of texts, or texts by name")
    named = dict(texts) if isinstance(texts, Mapping) else {f"text {at + 1}": text for at, text in enumerate(texts)}
    if not named:
        raise InputError("no text was given; leave them out for those that come with Python, or give two or more")
    return named
