"""What the suite holds: every property and what it says of itself."""

from __future__ import annotations

import importlib
import pkgutil

from lyra.conformance import properties

from .registry import Declaration


def all_properties() -> dict[str, Declaration]:
    """Every property of the suite by its name in reports, without parameters: `static::one_softmax`."""
    found = {}
    for info in pkgutil.iter_modules(properties.__path__, f"{properties.__name__}."):
        short = info.name.rpartition(".")[2].removeprefix("test_")
        for name, function in vars(importlib.import_module(info.name)).items():
            for mark in getattr(function, "pytestmark", []):
                if mark.name == "lyra" and function.__module__ == info.name:
                    found[f"{short}::{name.removeprefix('test_')}"] = mark.args[0]
    return found
