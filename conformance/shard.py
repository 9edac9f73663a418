"""One of n parts of the suite: which properties it runs, so that n jobs together run each of them once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lyra.spec.errors import InputError

FIXED_COST = 1.0
"""What a property costs beside its examples, in units of a property of weight 1: its share of what is compiled."""


MOST = 10_000
"""Shards of one run: far more than there are properties."""


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that `2/3` names. Raises InputError."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]) <= MOST:
            raise InputError(
                f"{text!r:.60} is no shard; write i/n with 1 ≤ i ≤ n ≤ {MOST}, such as 1/3 for the first of three"
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def chosen(self, weights: Mapping[str, float]) -> frozenset[str]:
        """The names that this shard runs, of properties with these weights; none where there are fewer than shards."""
        return frozenset(name for name, place in places(weights, self.count).items() if place == self.index)

    def empty(self) -> str:
        """Why this shard cannot be followed where it chose nothing."""
        return f"shard {self} has nothing to run: fewer than {self.index} properties are selected; use fewer shards"


def places(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """The shard, 1 to count, of every name: the costliest first, each to the shard that has the least to do so far.

    Depends on the names and their weights only, not on their order.
    """
    loads = [0.0] * count
    found = {}
    for name in sorted(weights, key=lambda name: (-weights[name], name)):
        place = loads.index(min(loads))
        loads[place] += weights[name] + FIXED_COST
        found[name] = place + 1
    return found
