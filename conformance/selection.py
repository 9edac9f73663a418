"""Which properties an `--only` expression names: words joined by and, or, not and parentheses, as pytest's -k has them.

pytest's own -k looks at the folders above a test as well, and "rope" is in "properties": it would select all of them.
"""

from __future__ import annotations

import re
import warnings

import pytest

from .session import UsageError

OPERATORS = frozenset({"and", "or", "not"})


def selects(expression: str, name: str) -> bool:
    """Whether the expression holds for a name, a word being true that stands in it. Raises UsageError."""

    def truth(word: re.Match[str]) -> str:
        return word[0] if word[0] in OPERATORS else str(word[0].lower() in name.lower())

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)
            return bool(eval(re.sub(r"[^\s()]+", truth, expression)))  # nothing is left but True, False, operators, ()
    except (SyntaxError, TypeError):
        raise UsageError(f"--only {expression!r} is no expression; write words joined by and, or, not and ()") from None


class Selection:
    """A pytest plugin that keeps the properties an expression names, by their names in reports or in their files."""

    def __init__(self, expression: str) -> None:
        self._expression = expression
        selects(expression, "")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect the others."""
        left_out = [item for item in items if not selects(self._expression, _names(item))]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]


def _names(item: pytest.Item) -> str:
    module, name = item.path.stem, item.name
    return f"{module}::{name} {module.removeprefix('test_')}::{name.removeprefix('test_')}"
