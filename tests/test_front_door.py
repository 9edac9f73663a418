"""What `import lyra` gives: public names, found when they are first asked for."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import lyra


@pytest.mark.parametrize("name", sorted(set(lyra.__all__) - {"__version__"}))
def test_no_module_hides_a_public_name(name: str) -> None:
    """Importing a submodule sets it as an attribute of its package, in the place of what is found lazily."""
    assert importlib.util.find_spec(f"lyra.{name}") is None
    assert getattr(lyra, name) is not sys.modules.get(f"lyra.{name}")


def test_every_public_name_is_listed() -> None:
    assert dir(lyra) == sorted(lyra.__all__)
    with pytest.raises(AttributeError, match="module 'lyra' has no attribute 'Loader'"):
        _ = lyra.Loader
