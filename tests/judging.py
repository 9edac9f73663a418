"""A run of the suite in this process, with a few examples of each property."""

from __future__ import annotations

from typing import Any

from lyra.conformance.runner import Run, run
from lyra.conformance.session import Profile, Session

FEW = Profile("smoke", examples=2, sizes=3)


def judged(
    *backends: Any, only: str | None = None, seed: int = 0, replay: str | None = None, shrink: bool = True
) -> Run:
    """What came of the properties that `only` selects, or of a replayed case."""
    return run(Session(backends=backends, profile=FEW, seed=seed, shrink=shrink), only=only, replay=replay)
