"""How a property is declared: which statements it holds, what it needs of a backend, what cases it is given.

A property is a plain function. What a run decides, how many cases there are and of which sizes, is put to it when it
is collected (`generation`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis.strategies import SearchStrategy

from lyra.spec.clauses import statements as known_statements

from .case import Case
from .premises import Premise
from .scope import Scope

Draws = Callable[[Scope], SearchStrategy[Case]]
"""Makes the strategy that a property's cases come from, for what a run draws from."""

Named = Callable[[Scope], Mapping[str, Case]]
"""Makes the cases of a property that Hypothesis has no part in, by name."""


@dataclass(frozen=True)
class Declaration:
    """What a property says of itself; kept on the pytest marker `lyra`."""

    statements: tuple[str, ...]
    needs: tuple[str, ...]
    profile: str
    check: Callable[..., None]
    premises: tuple[Premise, ...]
    weight: float = 1.0
    draws: Draws | None = None
    named: Named | None = None

    @property
    def summary(self) -> str:
        """What must hold, in a line."""
        return (inspect.getdoc(self.check) or "").splitlines()[0]


def prop(
    *statements: str,
    premise: Premise | tuple[Premise, ...],
    case: Draws | None = None,
    named: Named | None = None,
    needs: tuple[str, ...] = (),
    weight: float = 1.0,
    profile: str = "smoke",
) -> Callable[[Callable[..., None]], Any]:
    """Declare a property: `@prop("STATIC-2", case=lambda scope: cases(scope, context=True), needs=("static",))`.

    statements  the statements of SPEC.md it holds; the first is the one a failure is reported under
    premise     what has to come up in its cases, all of it if several: where it never does, nothing has passed
    case        makes a strategy of what a run draws from; the property then takes `case` and `judge`
    named       makes cases by name instead, each judged by itself; without either it is an ordinary pytest function
    needs       capabilities; a backend without them is unsupported, not failed
    weight      multiplies the profile's number of examples; what a property costs, where shards are balanced
    profile     the smallest profile it runs in
    Raises ValueError for a statement that SPEC.md does not have, without a premise, for a strategy in place of what
    makes one, and for cases both drawn and named.
    """
    unknown = [statement for statement in statements if statement not in known_statements()]
    if unknown or not statements:
        raise ValueError(f"a property must cite statements of SPEC.md; unknown: {unknown}")

    premises = (premise,) if isinstance(premise, Premise) else tuple(premise)
    names = [premise.name for premise in premises]
    if not premises or len(set(names)) < len(names):
        raise ValueError(f"a property says what it is about, by premises that differ: {names}")
    if isinstance(case, SearchStrategy) or (case and named):
        raise ValueError("a property takes its cases from a function of the scope: case=lambda scope: cases(scope)")

    def declare(function: Callable[..., None]) -> Any:
        if not inspect.getdoc(function):
            raise ValueError(f"{function.__name__}: a property says in its docstring what must hold")
        declaration = Declaration(
            tuple(statements), tuple(needs), profile, function, premises, weight, draws=case, named=named
        )
        return pytest.mark.lyra(declaration)(function)

    return declare
