"""What the conformance suite adds to pytest. pytest loads this (entry point pytest11) wherever Lyra is installed, also
where no property runs: so nothing heavy is imported before a run of the suite has begun.

Under pytest-xdist the properties run in worker processes, each with a session of its own. A worker sends what it saw
with the report of every property; the controller, which this plugin makes out, puts it together.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from .stash import OWN, SESSION

SURVIVES = "`lyra conform` (--isolate) names the backend and the case, and goes on with all the rest"
"""What is said where the end of a process has ended more than the case that did it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of `pytest --pyargs lyra.conformance`."""
    group = parser.getgroup("lyra", "Lyra conformance suite")
    group.addoption(
        "--lyra-backend",
        action="append",
        default=[],
        metavar="NAME",
        help="backend under test, by name or package.module:Class; may be repeated (default: all installed)",
    )
    group.addoption("--lyra-profile", default="smoke", choices=["smoke", "ci", "thorough"], help="how much to generate")
    group.addoption("--lyra-seed", type=int, default=0, help="seed of the generated cases")
    group.addoption("--lyra-spec", default=None, metavar="PRESET|FILE.toml", help="hold the suite to one spec or split")
    group.addoption("--lyra-only", default=None, metavar="WORDS", help="properties by name: words, and, or, not")
    group.addoption("--lyra-shard", default=None, metavar="I/N", help="run one of N parts of the suite, counted from 1")
    group.addoption("--lyra-replay", default=None, metavar="FILE.json", help="run one recorded case only")
    group.addoption(
        "--lyra-database", default=None, type=Path, metavar="DIR", help="keep failing examples here, try them first"
    )
    group.addoption("--lyra-json", default=None, type=Path, metavar="PATH", help="write the report as JSON")
    group.addoption("--lyra-report", default=None, type=Path, metavar="PATH.html", help="write the report as a page")


def pytest_configure(config: pytest.Config) -> None:
    """The marker that declares a property, and what follows a run."""
    config.addinivalue_line("markers", "lyra(declaration): a property of the conformance suite and what it cites")
    config.pluginmanager.register(Follower(config), "lyra-follower")


class Follower:
    """Follows one pytest run: puts together what its processes saw, and reports it at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._started = time.monotonic()
        self._is_worker = hasattr(config, "workerinput")
        self._crashed = 0

    def pytest_sessionstart(self) -> None:
        """Refuse what cannot be followed before workers start: each of them would say so."""
        options = ("lyra_backend", "lyra_spec", "lyra_only", "lyra_shard", "lyra_replay")
        chosen = any(self._config.getoption(name) not in (None, []) for name in options)
        if chosen and not self._is_worker and self._config.getoption("numprocesses", None):
            from .launch import begin

            begin(self._config)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """A shard with nothing to run is refused here too: what a worker says of it nobody would see."""
        session = self._config.stash.get(SESSION, None)
        if session is not None and session.shard is not None and not ids:
            pytest.exit(session.shard.empty(), returncode=pytest.ExitCode.USAGE_ERROR)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        """In a worker: what the property saw goes with its last report."""
        report = yield
        session = self._config.stash.get(SESSION, None)
        if self._is_worker and session is not None and call.when == "teardown":
            from .record_transfer import serialize_record

            report.lyra = serialize_record(session)
        return report

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """A worker has ended within a property: it is not finished, and where it would have cost less is said."""
        file = Path(crashitem.partition("::")[0])
        if file.parent.name == "properties" and (Path(__file__).parent / "properties" / file.name).is_file():
            from .launch import begin

            begin(self._config)
            self._crashed += 1
            report.longrepr = f"{report.longrepr}; {SURVIVES}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """In the controller: take in what a worker saw."""
        seen = getattr(report, "lyra", None)
        if seen is not None and not self._is_worker:
            from .launch import begin
            from .record_transfer import merge_record

            begin(self._config)
            merge_record(self._config.stash[SESSION], seen)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the reports that options ask for; what they do not call a pass is none for pytest either."""
        own = self._config.stash.get(OWN, False)
        if not own or self._is_worker or self._config.getoption("collectonly"):
            return
        from .report.write import finish

        paths = self._config.getoption("lyra_json"), self._config.getoption("lyra_report")
        run = self._config.stash[SESSION]
        run.record.planned = max(run.record.planned, run.record.finished + self._crashed)  # a worker may tell of none
        code = finish(run, *paths, seconds=time.monotonic() - self._started)
        if session.exitstatus == pytest.ExitCode.OK and run.record.planned:
            session.exitstatus = code

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """How much was compared, after pytest's own summary."""
        session = self._config.stash.get(SESSION, None)
        if session is not None:
            from .record_transfer import closing_lines

            for line in closing_lines(session.record):
                terminalreporter.write_line(line)
