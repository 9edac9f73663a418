"""One door for files that hold a table, TOML or JSON: specs, splits, cases, reports, configs of models.

Whatever else stands in such a file (bytes that are no UTF-8, a list, a table in ten thousand tables, nothing at all) is
refused in one line that names the file and what was expected.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections import Counter
from typing import Any

from .errors import SpecError

LARGEST = 1 << 28
"""Bytes that a file may have: 256 MiB, far above any report."""

DEEPEST = 64
"""Tables and lists within each other; those that Lyra knows have eight."""

NOTHING = object()
"""What a file without a word holds."""

Named = str | os.PathLike[str]


def read_toml(path: Named, *, refuse: type[ValueError] = SpecError, what: str = "a table") -> dict[str, Any]:
    """The table that a TOML file holds. Raises `refuse` where it holds none, OSError where there is no such file.

    `what` is what was expected, in the words of the message: "the splits of a model".
    """
    return parse_toml(_text(path, refuse, f"TOML with {what}"), _named(path), refuse=refuse, what=what)


def read_json(path: Named, *, refuse: type[ValueError] = SpecError, what: str = "an object") -> dict[str, Any]:
    """The object that a JSON file holds. Raises `refuse` where it holds none, OSError where there is no such file."""
    return parse_json(_text(path, refuse, f"JSON with {what}"), _named(path), refuse=refuse, what=what)


def parse_toml(
    text: str, name: str = "the text", *, refuse: type[ValueError] = SpecError, what: str = "a table"
) -> dict[str, Any]:
    """The table of a TOML text, `name` being what a message calls it. Raises `refuse`."""
    try:
        return _sound(tomllib.loads(text) if text.strip() else NOTHING, name, f"TOML with {what}", refuse)
    except RecursionError:
        raise refuse(_too_deep(name, f"TOML with {what}")) from None
    except refuse:
        raise
    except ValueError as error:  # numbers of more digits than Python reads are no TOMLDecodeError
        raise refuse(f"{name} is not TOML ({error}); expected TOML with {what}") from None


def parse_json(
    text: str, name: str = "the text", *, refuse: type[ValueError] = SpecError, what: str = "an object"
) -> dict[str, Any]:
    """The object of a JSON text, `name` being what a message calls it. Raises `refuse`."""
    try:
        found = json.loads(text, object_pairs_hook=_once) if text.strip() else NOTHING
        return _sound(found, name, f"JSON with {what}", refuse)
    except RecursionError:
        raise refuse(_too_deep(name, f"JSON with {what}")) from None
    except refuse:
        raise
    except ValueError as error:
        raise refuse(f"{name} is not JSON ({error}); expected JSON with {what}") from None


def _text(path: Named, refuse: type[ValueError], expected: str) -> str:
    """The text of a file, which may be a pipe. Raises OSError."""
    if os.path.isdir(path):
        raise refuse(f"{_named(path)} is a folder; expected a file, {expected}")
    try:
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except ValueError as error:  # a name with a null byte
        raise refuse(f"{_named(path)} is no name of a file ({error})") from None
    if len(data) > LARGEST:
        raise refuse(f"{_named(path)} is larger than {LARGEST >> 20} MiB; expected {expected}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(
            f"{_named(path)} is not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start}); expected {expected}"
        ) from None


def _sound(found: Any, name: str, expected: str, refuse: type[ValueError]) -> dict[str, Any]:
    """What was read, once it is known to be a table, not too deep and all of it text that can be printed."""
    if found is NOTHING:
        raise refuse(f"{name} is empty; expected {expected}")
    if not isinstance(found, dict):
        raise refuse(f"{name} holds {_kind(found)}; expected {expected}")
    level: list[Any] = [found]
    for _ in range(DEEPEST):
        inner = [item for group in level for item in (group.values() if isinstance(group, dict) else group)]
        names = [item for group in level if isinstance(group, dict) for item in group]
        for item in (*inner, *names):
            if (
                isinstance(item, str)
                and not item.isascii()
                and any("\ud800" <= character <= "\udfff" for character in item)
            ):
                raise refuse(f"{name} holds half of a surrogate pair, which is no text; expected {expected}")
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return found
    raise refuse(_too_deep(name, expected))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names each stand in it once: of two values neither is to be guessed. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        times = Counter(key for key, _ in pairs)
        raise ValueError(f"{next(key for key in times if times[key] > 1)!r} stands twice in one object")
    return found


def _kind(found: Any) -> str:
    if isinstance(found, list):
        return "a list"
    return {str: "a text", bool: "true or false", type(None): "null"}.get(type(found), "a number")


def _too_deep(name: str, expected: str) -> str:
    return f"{name} nests more than {DEEPEST} tables or lists; expected {expected}"


def _named(path: Named) -> str:
    return repr(os.fspath(path))
