"""What a pytest run of the suite keeps in its configuration, `config.stash`: nothing of a run is kept anywhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest loads this wherever Lyra is installed
    from .replay import Replay
    from .session import Session

SESSION: pytest.StashKey[Session] = pytest.StashKey()
"""The run, once it has begun in this process."""

REPLAY: pytest.StashKey[Replay | None] = pytest.StashKey()
"""The case that is run again, if it is one."""

OWN: pytest.StashKey[bool] = pytest.StashKey()
"""Whether pytest's options have made the session, so that pytest's exit code is to be that of the report."""
