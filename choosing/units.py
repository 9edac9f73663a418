"""What is chosen among: single query heads, or whole groups of those that share a KV head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit


@dataclass(frozen=True, order=True)
class Unit:
    """Query heads of one layer that go to Lyra together."""

    layer: int
    heads: tuple[int, ...]


def all_units(spec: ModelSpec, kv_aligned: bool) -> tuple[Unit, ...]:
    """Every query head of the global layers, or with `kv_aligned` every GQA group, in ascending order."""
    width = spec.attention.group_size if kv_aligned else 1
    starts = range(0, spec.num_attention_heads, width)
    return tuple(Unit(layer, tuple(range(at, at + width))) for layer in spec.global_layers for at in starts)


def units_wanted(spec: ModelSpec, heads: int, per_layer: bool, kv_aligned: bool) -> int:
    """How many units are chosen in all for `heads` query heads in all, or in every layer. Raises InputError."""
    layers, width = len(spec.global_layers), spec.attention.group_size if kv_aligned else 1
    most = spec.num_attention_heads * (1 if per_layer else layers)
    where = "in every layer" if per_layer else "in all"
    if not 0 < heads <= most:
        raise InputError(f"{heads} heads {where} are asked for; {spec.name} has 1 to {most} to choose from")
    if heads % width:
        raise InputError(
            f"{heads} heads {where} are asked for and only whole groups of {width} are to be chosen; ask for a multiple"
        )
    return heads // width * (layers if per_layer else 1)


def blends_of(spec: ModelSpec, chosen: Iterable[Unit]) -> np.ndarray:
    """Blends [L,Hq] of the global layers: 1 for the heads of the chosen units, 0 for others."""
    blends = np.zeros((len(spec.global_layers), spec.num_attention_heads))
    for unit in chosen:
        blends[spec.global_layers.index(unit.layer), list(unit.heads)] = 1.0
    return blends


def blends_of_split(spec: ModelSpec) -> np.ndarray:
    """The same of the splits that a model's spec has."""
    blends = np.zeros((len(spec.global_layers), spec.num_attention_heads))
    for row, layer in enumerate(spec.global_layers):
        blends[row, list(spec.layer(layer).lyra_q_heads)] = 1.0
    return blends


def splits_of(spec: ModelSpec, chosen: Iterable[Unit]) -> dict[int, HeadSplit]:
    """The split of every layer that has chosen heads; `share_kv` is set where it cuts a group."""
    heads: dict[int, list[int]] = {}
    for unit in sorted(chosen):
        heads.setdefault(unit.layer, []).extend(unit.heads)
    return {layer: HeadSplit.from_q_heads(spec, own, share_kv=None) for layer, own in heads.items()}


def next_units(units: Sequence[Unit], order: Sequence[Unit], per_layer: bool) -> list[Unit]:
    """What may come next behind `order`, ascending: any unit left, or one of a layer that has the fewest so far."""
    left = [unit for unit in units if unit not in set(order)]
    if not per_layer:
        return left
    counts = {unit.layer: sum(taken.layer == unit.layer for taken in order) for unit in left}
    return [unit for unit in left if counts[unit.layer] == min(counts.values())]
