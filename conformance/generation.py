"""Puts generated cases into a property: Hypothesis, as the profile, the seed and the database of a run say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from .case import Case
from .registry import Declaration
from .session import Session

SUPPRESSED = (
    HealthCheck.function_scoped_fixture,
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
)
"""Hypothesis's doubts that do not apply: a judge serves all cases of a property, and arrays are drawn by their seed."""


def settings_of(session: Session, weight: float = 1.0, **changes: Any) -> settings:
    """Hypothesis's settings for a property of this weight in this run, whatever profile of Hypothesis is loaded.

    It explains nothing: the first diverging stage says more.
    """
    fixed: dict[str, Any] = {
        "max_examples": session.examples(weight),
        "deadline": None,
        "derandomize": False,
        "database": DirectoryBasedExampleDatabase(session.database) if session.database else None,
        "print_blob": False,
        "report_multiple_bugs": False,
        "phases": [
            phase for phase in Phase if phase is not Phase.explain and (session.shrink or phase is not Phase.shrink)
        ],
        "suppress_health_check": SUPPRESSED,
    }
    return settings(**(fixed | changes))


def generated(declaration: Declaration, session: Session) -> Callable[..., None]:
    """The property as a Hypothesis test of this run, which takes all that the property takes but `case`."""
    assert declaration.draws is not None
    check = with_data(declaration.check, session.profile.data)
    test = given(case=declaration.draws(session.scope))(check)
    return settings_of(session, declaration.weight)(seed(session.seed)(test))


def with_data(check: Callable[..., None], times: int) -> Callable[..., None]:
    """A property that holds each case `times` times, with other data each time; the case that fails is the one kept."""

    @functools.wraps(check)
    def hold(case: Case, **rest: Any) -> None:
        for index in range(times):
            check(case=case.with_other_data(index), **rest)

    return hold
