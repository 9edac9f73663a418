"""What has been chosen, and why: the splits by layer, and the figures that they rest on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from .documents import Kind
from .objective import Objective
from .ranking import Method


@dataclass(frozen=True)
class Point:
    """A number of heads: which, the bytes that 1,000 tokens of context take, and mean NLL by kind, in nats.

    `score` is what the choosing documents say: 0 no gain, 1 that of all heads.
    """

    heads: int
    splits: Mapping[int, HeadSplit]
    bytes_per_1000_tokens: int
    score: float
    choosing: Mapping[Kind, float]
    held_out: Mapping[Kind, float]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "heads": self.heads,
            "lyra_q_heads": {str(layer): list(split.lyra_q_heads) for layer, split in self.splits.items()},
            "bytes_per_1000_tokens": self.bytes_per_1000_tokens,
            "score": self.score,
            "choosing": dict(self.choosing),
            "held_out": dict(self.held_out),
        }


@dataclass(frozen=True)
class Choice:
    """What was asked for; `heads` in all, or in every layer."""

    model: str
    layers: tuple[int, ...]
    heads: int
    per_layer: bool
    objective: Objective
    method: Method
    kv_aligned: bool
    context_tokens: int
    live_tokens: int


@dataclass(frozen=True)
class Report:
    """What was found. `curve` has a point for every number of heads that was measured, none first and all last.

    order   query heads as (layer, head), the best first
    alone   by kind in nats, and as "score", what each head gains alone on the choosing documents: float64 [L,Hq]
    chosen  where on the curve what was asked for stands
    """

    choice: Choice
    order: tuple[tuple[int, int], ...]
    documents: Mapping[str, tuple[str, ...]]
    alone: Mapping[str, np.ndarray]
    curve: tuple[Point, ...]
    chosen: int

    @property
    def point(self) -> Point:
        """What was asked for."""
        return self.curve[self.chosen]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What was scored."""
        return tuple(self.curve[0].choosing)

    def gain(self, point: Point, where: str, kind: Kind) -> float:
        """What a point gains over no head, in nats; `where` is "choosing" or "held_out"."""
        none: float = getattr(self.curve[0], where)[kind]
        return none - getattr(point, where)[kind]

    def share(self, point: Point, where: str, kind: Kind) -> float:
        """The same as a share of what all heads gain; NaN where they gain nothing."""
        every = self.gain(self.curve[-1], where, kind)
        return self.gain(point, where, kind) / every if every > 0 else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return asdict(self.choice) | {
            "documents": {name: list(names) for name, names in self.documents.items()},
            "order": [list(head) for head in self.order],
            "alone": {kind: gains.tolist() for kind, gains in self.alone.items()},
            "curve": [point.to_dict() for point in self.curve],
            "chosen": self.chosen,
        }


class ChosenSplit(Mapping[int, HeadSplit]):
    """The split of each layer that has Lyra heads, as `attach` and `load` take it, with the `report` behind it."""

    def __init__(self, spec: ModelSpec, report: Report) -> None:
        self.spec, self.report = spec, report

    def __getitem__(self, layer: int) -> HeadSplit:
        return self.report.point.splits[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.report.point.splits)

    def __len__(self) -> int:
        return len(self.report.point.splits)

    def __repr__(self) -> str:
        return f"ChosenSplit({ {layer: split.lyra_q_heads for layer, split in self.items()} })"

    def with_heads(self, heads: int) -> ChosenSplit:
        """The choice of another number of heads in all, which the same curve tells. Raises InputError."""
        known = [point.heads for point in self.report.curve]
        if heads not in known:
            raise InputError(f"{heads} heads were not measured; the curve has {known}")
        return ChosenSplit(self.spec, replace(self.report, chosen=known.index(heads)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model's spec with these splits as TOML, which is taken wherever a split or a spec is given."""
        self.spec.with_split(self).to_toml(path)
