"""The conformance suite: properties of the spec, run against any backend, ours or a third party's.

`check_split` and `check_case` hold backends to the spec from a test of your own; `strategies` makes cases for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import strategies
    from .check import Checked, check_case, check_split
    from .subject import BackendError, Divergence

__all__ = ["BackendError", "Checked", "Divergence", "check_case", "check_split", "strategies"]

_HOME = {
    "BackendError": "subject",
    "Checked": "check",
    "Divergence": "subject",
    "check_case": "check",
    "check_split": "check",
}


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module(".strategies", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
