"""What makes heads worth choosing: how much of the gain of all heads they keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from .documents import Kind

Objective = Literal["recall", "continuation", "both"]

WEIGHTS: dict[Objective, dict[Kind, float]] = {
    "continuation": {"continuation": 1.0},
    "recall": {"recall": 0.5, "passkey": 0.5},
    "both": {"continuation": 0.5, "recall": 0.25, "passkey": 0.25},
}
"""How much each kind of passage counts: text and pass keys share recall."""

LEAST = 0.01
"""A gain of all heads below this many nats is no measure for others."""


class Score:
    """The weighted mean, over kinds of passages, of the gain in units of what all heads gain there: 0 none, 1 all."""

    def __init__(self, objective: Objective, none: Mapping[Kind, float], every: Mapping[Kind, float]) -> None:
        """`none` and `every` are the mean NLL without any head and with all of them."""
        wanted = {kind: weight for kind, weight in WEIGHTS[objective].items() if kind in none}
        total = sum(wanted.values())
        self._none = none
        self._per_nat = {
            kind: weight / total / max(abs(none[kind] - every[kind]), LEAST) for kind, weight in wanted.items()
        }

    def of(self, nll: Mapping[Kind, np.ndarray] | Mapping[Kind, float]) -> np.ndarray:
        """The score of a candidate, or of each of C, [C], from its mean NLL by kind."""
        return self._sum({kind: self._none[kind] - nll[kind] for kind in self._per_nat})

    def slope(self, gradient: Mapping[Kind, np.ndarray]) -> np.ndarray:
        """The gradient of the score from those of the mean NLL by kind."""
        return self._sum({kind: -gradient[kind] for kind in self._per_nat})

    def _sum(self, gains: Mapping[Kind, Any]) -> np.ndarray:
        total: np.ndarray = np.sum([gains[kind] * weight for kind, weight in self._per_nat.items()], axis=0)
        return total
