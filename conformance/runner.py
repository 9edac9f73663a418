"""Runs the suite in this process, outside pytest's own command line: workers of `lyra conform`, faults, tests."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from .launch import SessionPlugin
from .record import Record
from .selection import selects
from .session import Session


@dataclass(frozen=True)
class Run:
    """What came of a run: pytest's exit code, its own output, and the record."""

    exit_code: int
    log: str
    record: Record

    @property
    def found_nothing(self) -> bool:
        """Whether no property is named so, or none of this profile."""
        return self.exit_code == pytest.ExitCode.NO_TESTS_COLLECTED

    @property
    def refused(self) -> str | None:
        """Why the options cannot be followed, if they cannot."""
        if self.exit_code != pytest.ExitCode.USAGE_ERROR:
            return None
        return self.log.rpartition("ERROR: ")[2].strip()

    @property
    def could_not_run(self) -> bool:
        """Whether pytest itself could not run the suite (no property found, an error outside all properties).

        A run that somebody interrupted after the first property has something to report: it did not break.
        """
        cut_short = self.exit_code == pytest.ExitCode.INTERRUPTED and self.record.finished > 0
        return not cut_short and self.exit_code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)


class Progress:
    """A pytest plugin that reports each property as it ends: (name, done, total)."""

    def __init__(self, tell: Callable[[str, int, int], None]) -> None:
        self._tell = tell
        self._done = 0
        self._total = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many properties there are."""
        self._total = len(session.items)
        self._tell("", 0, self._total)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """One more is done."""
        self._done += 1
        self._tell(nodeid.rpartition("::")[2].removeprefix("test_"), self._done, self._total)


def run(
    session: Session,
    *,
    fail_fast: bool = False,
    replay: str | None = None,
    only: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    plugins: Sequence[object] = (),
) -> Run:
    """Run the properties against the session's backends, in this process, and give what was seen.

    `only` is an expression over the properties' names, such as "rope and not far"; `plugins` are further ones for
    pytest. Raises InputError for an `only` that is no expression.
    """
    if only is not None:
        selects(only, "", "")
    folder = Path(__file__).parent / "properties"
    arguments = [str(folder), "-q", "--capture=no", "-p", "no:cacheprovider", f"--rootdir={folder.parent}"]
    arguments += ["-c", os.devnull]  # the configuration of whatever project this runs in is not the suite's
    arguments += ["--tb=native"]  # pytest's own tracebacks parse every file on the way: seconds for a failure
    arguments += ["-p", "no:unraisableexception"]  # it looks through all of memory five times at the end of a run
    arguments += ["-x"] if fail_fast else []
    arguments += [f"--lyra-replay={replay}"] if replay is not None else []
    arguments += [f"--lyra-only={only}"] if only is not None else []
    all_plugins = [SessionPlugin(session), *plugins, *([Progress(progress)] if progress else [])]
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        code = pytest.main(arguments, plugins=all_plugins)
    return Run(int(code), log.getvalue(), session.record)
