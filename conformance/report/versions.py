"""With what a run was made."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("lyra", "numpy", "torch", "transformers", "jax", "flax", "hypothesis", "pytest")


def versions() -> dict[str, str]:
    """Versions of what took part, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
