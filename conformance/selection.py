"""Which properties an `--only` expression names: words joined by and, or, not and parentheses, as pytest's -k has them.

pytest's own -k looks at the folders above a test as well, and "rope" is in "properties": it would select all of them.
"""

from __future__ import annotations

import re
import warnings

from lyra.spec.errors import InputError

EMPTY = re.compile(r"^\s*$|\(\s*\)")
OPERATORS = frozenset({"and", "or", "not"})


def selects(expression: str, module: str, name: str) -> bool:
    """Whether the expression holds for the property `name` of a test `module`, a word being true that stands in them.

    Both are looked at as their files have them (test_static::test_one) and as reports do (static::one). Raises
    InputError for what is no expression.
    """
    names = f"{module}::{name} {module.removeprefix('test_')}::{name.removeprefix('test_')}".lower()

    def truth(word: re.Match[str]) -> str:
        return word[0] if word[0] in OPERATORS else str(word[0].lower() in names)

    words = re.sub(r"[^\s()]+", truth, expression)  # nothing is left but True, False, operators, ()
    try:
        if EMPTY.search(words):
            raise SyntaxError("nothing between parentheses")
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)
            return bool(eval(words))
    except (SyntaxError, TypeError, MemoryError, RecursionError):  # the last two for a thousand parentheses
        raise InputError(
            f"--only {expression!r:.200} is no expression; write words joined by and, or, not and ()"
        ) from None
