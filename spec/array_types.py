"""Types of arrays that say their axes, as in `Float[np.ndarray, "B T Hq D"]`; docs/glossary.md says what the axes are.

They are jaxtyping's in a process that has loaded jaxtyping before: there its import hook checks every call, as the
tests do. Elsewhere nothing needs it and nothing loads it, since an annotation is only read by type checkers.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

__all__ = ["Bool", "Float", "Int", "Shaped"]

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import Bool, Float, Int, Shaped
else:

    class Shaped:
        """An array of any type of elements; what stands in brackets is the array's class and its axes."""

        def __class_getitem__(cls, item: tuple[Any, str]) -> Any:
            return item[0]

    class Float(Shaped):
        """An array of floats of any width."""

    class Int(Shaped):
        """An array of signed integers."""

    class Bool(Shaped):
        """An array of True and False."""
