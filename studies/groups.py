"""What belongs together among runs and rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Key = TypeVar("Key")


def groups(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """The items by what `key` gives for them, in the order in which it first comes."""
    members: dict[Key, list[Item]] = {}
    for item in items:
        members.setdefault(key(item), []).append(item)
    return members
