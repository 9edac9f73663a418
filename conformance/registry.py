"""How a property is declared: which statements it holds, what it needs of a backend, what cases it is given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

from lyra.spec.clauses import statements as known_statements

from .case import Case
from .premises import Premise
from .session import current


@dataclass(frozen=True)
class Declaration:
    """What a property says of itself; kept on the pytest marker `lyra`."""

    statements: tuple[str, ...]
    needs: tuple[str, ...]
    profile: str
    check: Callable[..., None]
    premises: tuple[Premise, ...]
    weight: float = 1.0

    @property
    def summary(self) -> str:
        """What must hold, in a line."""
        return (inspect.getdoc(self.check) or "").splitlines()[0]


def prop(
    *statements: str,
    premise: Premise | tuple[Premise, ...],
    case: SearchStrategy[Case] | None = None,
    needs: tuple[str, ...] = (),
    weight: float = 1.0,
    profile: str = "smoke",
) -> Callable[[Callable[..., None]], Any]:
    """Declare a property: `@prop("STATIC-2", case=cases(context=True), needs=("static",))`.

    statements  the statements of SPEC.md it holds; the first is the one a failure is reported under
    premise     what has to come up in its cases, all of it if several: where it never does, nothing has passed
    case        a strategy; the property then takes `case` and `judge`. Without one it is an ordinary pytest function
    needs       capabilities; a backend without them is unsupported, not failed
    weight      multiplies the profile's number of examples; what a property costs, where shards are balanced
    profile     the smallest profile it runs in
    Raises ValueError for a statement that SPEC.md does not have, and without a premise.
    """
    unknown = [one for one in statements if one not in known_statements()]
    if unknown or not statements:
        raise ValueError(f"a property must cite statements of SPEC.md; unknown: {unknown}")

    premises = (premise,) if isinstance(premise, Premise) else tuple(premise)
    if not premises or len({one.name for one in premises}) < len(premises):
        raise ValueError(f"a property says what it is about, by premises that differ: {[one.name for one in premises]}")

    def declare(function: Callable[..., None]) -> Any:
        if not inspect.getdoc(function):
            raise ValueError(f"{function.__name__}: a property says in its docstring what must hold")
        test: Any = function
        if case is not None:
            session = current()
            test = settings(
                max_examples=session.examples(weight),
                deadline=None,
                database=session.examples_database(),
                print_blob=False,
                report_multiple_bugs=False,
                phases=session.phases,
                suppress_health_check=[
                    HealthCheck.function_scoped_fixture,
                    HealthCheck.too_slow,
                    HealthCheck.data_too_large,
                    HealthCheck.large_base_example,
                ],
            )(seed(session.seed)(given(case=case)(with_data(function, session.profile.data))))
        return pytest.mark.lyra(Declaration(tuple(statements), tuple(needs), profile, function, premises, weight))(test)

    return declare


def with_data(check: Callable[..., None], times: int) -> Callable[..., None]:
    """A property that holds each case `times` times, with other data each time; the case that fails is the one kept."""

    @functools.wraps(check)
    def hold(case: Case, **rest: Any) -> None:
        for index in range(times):
            check(case=case.with_other_data(index), **rest)

    return hold
