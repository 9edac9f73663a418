"""Runs the suite in processes of its own, so that nothing a backend does can end the run: `lyra conform`.

A process tells what it saw after every property, and keeps in a journal what it is at. Where it ends before its time,
the backend that was asked then has erred in that property, and another process goes on with the rest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lyra.spec.errors import InputError

from .journal import Place
from .record import BY_ITSELF, Failure, Property
from .record_transfer import read_record
from .replay import write_replay
from .session import Card, Session

MOST_ENDS = 3
"""Processes that a backend may end: then it is given up."""

GRACE = 10.0
"""Seconds that a process has, once it was told to end or has said that it is done, until it is killed."""

START = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from lyra.conformance.worker import main
main(sys.argv[2])"""

Tell = Callable[[str, int, int], None]


@dataclass
class Course:
    """How far a run has come.

    planned  every property that is to be judged, and the backends that lack what it needs
    done     those that are settled
    gone     backends, as they were asked for, that are not loaded any more, and why
    without  backends that ended a process in a property, by property
    log      what pytest wrote where it could not go on
    """

    planned: dict[str, Property] = field(default_factory=dict)
    lacking: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    gone: dict[str, str] = field(default_factory=dict)
    without: dict[str, list[str]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    log: str = ""


class Supervisor:
    """One run of the suite. `session` has no backend: its record and cards are filled with what processes tell."""

    def __init__(self, session: Session, task: dict[str, Any], tell: Tell) -> None:
        self.session = session
        self.course = Course()
        self._task = task
        self._tell = tell
        self._cards: dict[str, Card] = {}

    def run(self) -> Course:
        """Judge every property, in as many processes as it takes. Ctrl-C ends the run early, without an exception.

        Raises InputError for options that cannot be followed.
        """
        with tempfile.TemporaryDirectory(prefix="lyra-conform-", ignore_cleanup_errors=True) as folder:
            self._journal = Path(folder) / "journal"
            with Keys() as keys:
                while self._one_process(keys):
                    pass
        self._settle_the_gone()
        return self.course

    def _one_process(self, keys: Keys) -> bool:
        """Run one process to its end; whether another one has to go on."""
        self._journal.write_text("", encoding="utf-8")
        task = self._task | {
            "journal": str(self._journal),
            "gone": list(self.course.gone),
            "done": sorted(self.course.done),
            "without": self.course.without,
        }
        command = [sys.executable, "-P", "-c", START, json.dumps(sys.path), json.dumps(task)]
        with Process(command, keys) as process:
            if any(self._take(message) for message in process.messages()) or keys.presses:
                return False
        self._lost(how_it_ended(process.status), Place.read(self._journal))
        done = self.course.planned and len(self.course.done) == len(self.course.planned)
        return not (done or self.course.log or self._task["fail_fast"])

    def _take(self, message: dict[str, Any]) -> bool:
        """Take in what a process tells; whether it was its last word. Raises InputError."""
        match message["kind"]:
            case "refused":
                raise InputError(message["message"])
            case "backend":
                self._cards[message["requested_as"]] = Card(
                    message["name"], tuple(message["capabilities"]), message["hardware"]
                )
            case "unloadable":
                self._give_up(message["requested_as"], message["message"])
            case "planned":
                self._plan(message["properties"])
            case "property":
                self._settle(message["seen"])
            case "ended":
                self._end(message)
                return True
        return False

    def _plan(self, properties: list[dict[str, Any]]) -> None:
        """What is to be judged: the first process that comes so far says it; others say what further backends lack."""
        for one in properties:
            name = one["name"]
            self.course.planned.setdefault(
                name, Property(name, tuple(one["statements"]), one["summary"], tuple(one["premises"]))
            )
            self.course.lacking.setdefault(name, {}).update(one["lacking"])
        self.session.record.planned = len(self.course.planned)
        self._tell("", len(self.course.done), len(self.course.planned))

    def _settle(self, seen: str) -> None:
        """What came of a property that is done."""
        record = read_record(seen)
        self.session.record.add(dataclasses.replace(record, planned=0, finished=0))
        for name in record.properties:
            self.course.seconds[name] = self.course.seconds.get(name, 0.0) + record.seconds
            self._done(name)

    def _done(self, name: str) -> None:
        self.course.done.add(name)
        self.session.record.finished = len(self.course.done)
        self._tell(name, len(self.course.done), len(self.course.planned))

    def _end(self, message: dict[str, Any]) -> None:
        """The last word of a process: pytest's exit code, and what it saw of a property that it did not finish."""
        if message["seen"]:
            self.session.record.add(dataclasses.replace(read_record(message["seen"]), planned=0, finished=0))
        expected = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        if message["exit_code"] not in expected:
            self.course.log = message["log"]

    def _lost(self, how: str, at: Place) -> None:
        """A process ended before its time: who is to blame. With a log in the course no other one goes on."""
        course = self.course
        course.ends[at.backend] += 1
        requested_as = next((name for name, card in self._cards.items() if card.name == at.backend), at.backend)
        if at.backend and not at.property:
            self._give_up(requested_as, f"{how} while the backend was loaded")
        elif at.backend:
            self._blame(at, f"{how} while the backend was asked")
            if course.ends[at.backend] >= MOST_ENDS:
                why = f"given up: it has ended {MOST_ENDS} processes, the last one in {at.property}"
                self._give_up(requested_as, why)
        elif at.property:
            self._break(at.property, f"{how} within {BY_ITSELF}, while no backend was asked")
        if not at.backend and (course.ends[""] >= MOST_ENDS or not course.planned):
            course.log = f"{how} while no backend was asked; the run ends here"

    def _blame(self, at: Place, message: str) -> None:
        """A backend has erred in a property, in which it is not asked again; the others are."""
        self._fail(at.property, at.backend, message, at.case)
        self.course.without.setdefault(at.property, []).append(at.backend)
        names = {card.name for requested_as, card in self._cards.items() if requested_as not in self.course.gone}
        if names <= set(self.course.without[at.property]):
            self._done(at.property)

    def _break(self, name: str, message: str) -> None:
        """A property has ended a process by itself: no backend has passed it."""
        for requested_as, card in self._cards.items():
            if requested_as not in self.course.gone and not self.course.lacking[name].get(card.name):
                self._fail(name, card.name, message, None)
        self._done(name)

    def _fail(self, name: str, backend: str, message: str, case: str | None) -> None:
        prop, record = self.course.planned[name], self.session.record
        record.register(name, prop.statements, prop.summary, prop.premises)
        failure = Failure(name, backend, prop.statements, "errored", message, stage=None, case=case)
        if case is not None:
            failure = dataclasses.replace(failure, replay=str(write_replay(failure)))
        record.fail(failure)

    def _give_up(self, requested_as: str, why: str) -> None:
        self.course.gone[requested_as] = why
        self._cards.setdefault(requested_as, Card(requested_as, (), None))

    def _settle_the_gone(self) -> None:
        """What is given up has erred in all that was judged without it, but for what it lacks a capability for."""
        record = self.session.record
        for requested_as, why in self.course.gone.items():
            name = self._cards[requested_as].name
            for prop in record.properties.values():
                tally = prop.tallies.get(name)
                if tally is not None and (tally.marked != "unsupported" or tally.why_unsupported):
                    continue
                if lacking := self.course.lacking.get(prop.name, {}).get(name):
                    prop.tally(name).why_unsupported = f"lacks {', '.join(lacking)}"
                else:
                    self._fail(prop.name, name, why, None)
        self.session.judged = tuple(self._cards.values())
        self.session.requested_as = {
            card.name: requested_as for requested_as, card in self._cards.items() if requested_as in self._task["names"]
        }


class Process:
    """A process of the suite: `messages` are what it tells. Leaving it ends it, and whatever it has started."""

    def __init__(self, command: list[str], keys: Keys) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        # A session of its own: neither the terminal's Ctrl-C nor a signal to the whole group concerns both processes.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._keys = keys
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """End the process, in its own time unless something went wrong here or Ctrl-C was pressed twice."""
        if kind is None and self._keys.presses < 2:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        with suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self.status = self._process.wait()
        self._close()

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the process tells, until it ends. At Ctrl-C it is told to end, and has a few seconds for it."""
        until = float("inf")
        while time.monotonic() < until and self._keys.presses < 2:
            if self._keys.presses and until == float("inf"):
                until = time.monotonic() + GRACE
                self._close()
            try:
                line = self._lines.get(timeout=0.2)
            except queue.Empty:
                if self._process.poll() is not None:
                    return  # ended, though another process that it has started holds the pipe
                continue
            if line is None:
                return
            with suppress(ValueError):
                yield json.loads(line)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(OSError, ValueError):
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _close(self) -> None:
        """The end of its input tells the process to end."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()


class Keys:
    """How often Ctrl-C is pressed while this lasts, where it would end a run otherwise."""

    def __init__(self) -> None:
        self.presses = 0
        self._before: Any = None

    def __enter__(self) -> Keys:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        self.presses += 1


def how_it_ended(status: int) -> str:
    """The end of a process in words."""
    if status >= 0:
        return f"the process ended by itself (exit status {status})"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (as the system does where memory runs out)" if name == "SIGKILL" else ""
    return f"the process was killed by {name}{hint}"
