"""Backends without a framework, right and wrong on purpose: what runs in processes of their own are made of."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lyra.backends.protocol import Result
from lyra.spec.attention import AttentionSpec

EXAMPLES = str(Path(__file__).parents[1] / "examples")
if EXAMPLES not in sys.path:
    sys.path.append(EXAMPLES)

from numpy_backend import NumpyAttention, NumpyBackend  # noqa: E402


class Changed(NumpyAttention):
    """A layer whose answers go through its backend's `change`."""

    backend: Right

    def __call__(self, x: np.ndarray, **rest: Any) -> Result:
        return self.backend.change(super().__call__(x, **rest))


class Right(NumpyBackend):
    """The example, with a door to change what comes out of it."""

    name = "right"

    def attention(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> NumpyAttention:
        """A layer behind the door."""
        layer = super().attention(spec, weights)
        changed = Changed(layer.spec, layer.weights)
        object.__setattr__(changed, "backend", self)
        return changed

    def change(self, result: Result) -> Result:
        """What comes out; nothing changes here."""
        return result


class Modest(Right):
    """Right, but able to do nothing beyond one call without a context."""

    name = "modest"
    capabilities = frozenset()


class Zeros(Right):
    """Returns zeros."""

    name = "zeros"

    def change(self, result: Result) -> Result:
        """Nothing at all."""
        return result._replace(output=np.zeros_like(result.output))


class Raises(Right):
    """Raises at every call."""

    name = "raises"

    def change(self, result: Result) -> Result:
        """No answer."""
        raise RuntimeError("out of order")


class SlightlyOff(Right):
    """Wrong by one per mille, from the third token of a call on."""

    name = "off"

    def change(self, result: Result) -> Result:
        """The later rows of the output, a little larger, in the trace too."""
        output = result.output.copy()
        output[:, 2:] *= np.float32(1.001)
        return result._replace(output=output, trace={**result.trace, "output": output} if result.trace else {})
