"""What makes heads worth choosing: how much of what all heads gain they keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from .documents import Kind

Objective = Literal["recall", "continuation", "both", "passkey"]

COUNTED: dict[Objective, tuple[Kind, ...]] = {
    "recall": ("recall",),
    "continuation": ("continuation",),
    "both": ("continuation", "recall"),
    "passkey": ("passkey",),
}
"""The kinds of passages whose mean NLL is added up. Pass keys stand alone: what serves them may harm real texts."""

LEAST = 0.01
"""A gain of all heads below this many nats is no measure for others."""


class Score:
    """The gain in mean NLL, added up over kinds of passages, as a share of what all heads gain: 0 none, 1 all."""

    def __init__(self, objective: Objective, none: Mapping[Kind, float], every: Mapping[Kind, float]) -> None:
        """`none` and `every` are the mean NLL without any head and with all of them."""
        self._counted = COUNTED[objective]
        self._none = self._sum(none)
        self._unit = max(abs(self._none - self._sum(every)), LEAST)

    def of(self, nll: Mapping[Kind, np.ndarray] | Mapping[Kind, float]) -> np.ndarray:
        """The score of a candidate, or of each of C, [C], from its mean NLL by kind."""
        return (self._none - self._sum(nll)) / self._unit

    def slope(self, gradient: Mapping[Kind, np.ndarray]) -> np.ndarray:
        """The gradient of the score from those of the mean NLL by kind."""
        return -self._sum(gradient) / self._unit

    def _sum(self, values: Mapping[Kind, Any]) -> Any:
        return np.sum([values[kind] for kind in self._counted], axis=0)
