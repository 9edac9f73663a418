"""Two ways to rank heads: by measuring every choice, and by gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np

from lyra.spec.model import ModelSpec

from .units import Unit, blends_of, next_units

Method = Literal["gradient", "greedy"]
METHODS: tuple[Method, ...] = get_args(Method)

PASSES = 4
"""Gradients that the fast method takes."""

DECIMALS = 5
"""Scores that agree to so many decimals are a tie, which the lowest layer and head win: backends differ beyond."""

Scores = Callable[[str, Sequence[np.ndarray]], np.ndarray]
"""The scores [C] of candidates, blends [L,Hq] each; the text says what they are measured for."""

Slope = Callable[[str, np.ndarray], np.ndarray]
"""The gradient [L,Hq] of the score at blends [L,Hq]."""


def by_greedy(spec: ModelSpec, units: Sequence[Unit], scores: Scores, per_layer: bool, most: int) -> list[Unit]:
    """Forward selection: at each step the unit that, added to those before it, scores best.

    After `most` steps the rest follow in the order of their last scores.
    """
    order: list[Unit] = []
    last: dict[Unit, float] = {}
    while len(order) < min(most, len(units)):
        candidates = next_units(units, order, per_layer)
        found = scores(f"head {len(order) + 1}", [blends_of(spec, [*order, unit]) for unit in candidates])
        last |= zip(candidates, found.tolist(), strict=True)
        order.append(candidates[first_best(found)])
    return _followed_by_rest(units, order, last, per_layer)


def greedy_candidates(units: Sequence[Unit], per_layer: bool, most: int) -> int:
    """How many candidates `by_greedy` measures in all: it does not depend on which it takes."""
    order: list[Unit] = []
    total = 0
    while len(order) < min(most, len(units)):
        candidates = next_units(units, order, per_layer)
        total += len(candidates)
        order.append(candidates[0])
    return total


def by_gradient(spec: ModelSpec, units: Sequence[Unit], slope: Slope, per_layer: bool) -> list[Unit]:
    """Integrated gradients: what each head contributes on the way from no head to all, all blends opening together.

    The contributions add up to what all heads gain together, and each counts what a head does beside others, which
    its gain alone does not show. The integral is a Gauss-Legendre sum of PASSES gradients. Source: Sundararajan et al.
    2017, "Axiomatic Attribution for Deep Networks"; blends of heads as in DuoAttention (Xiao et al. 2024).
    """
    nodes, weights = np.polynomial.legendre.leggauss(PASSES)
    whole = blends_of(spec, units)
    contribution = np.zeros_like(whole)
    for number, (node, weight) in enumerate(zip(nodes, weights, strict=True)):
        contribution += weight / 2 * slope(f"gradient {number + 1} of {PASSES}", whole * (node + 1) / 2)
    value = {unit: float((contribution * blends_of(spec, [unit])).sum()) for unit in units}
    return _followed_by_rest(units, [], value, per_layer)


def first_best(scores: np.ndarray) -> int:
    """The index of the highest score, the first of those that tie."""
    return int(np.argmax(np.round(scores, DECIMALS)))


def _followed_by_rest(
    units: Sequence[Unit], order: list[Unit], value: dict[Unit, float], per_layer: bool
) -> list[Unit]:
    order = list(order)
    while candidates := next_units(units, order, per_layer):
        order.append(candidates[first_best(np.array([value[unit] for unit in candidates]))])
    return order
