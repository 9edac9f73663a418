"""Runs the suite in processes of its own, so that nothing a backend does can end the run: `lyra conform`.

A process tells what it saw after every property, and keeps in a journal what it is at. Where it ends before its time,
or is ended since a case takes too long, the backend that was asked then has erred in that case. Another process goes on
with all the rest: the other cases of the property, and the other backends in it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lyra.spec.errors import InputError

from .journal import Place
from .process import Keys, Process, Watch, how_it_ended, took_too_long
from .record import BY_ITSELF, Failure, Property
from .record_transfer import read_record
from .replay import write_replay
from .session import Card, Session

CASE_LIMIT = 300.0
"""Seconds that a backend has for a case, what it compiles for it included, unless a user says otherwise."""

MOST_CASES = 2
"""Cases of one property that may end a process: then the backend is not asked there any more."""

MOST_ENDS = 20
"""Processes that a backend may end with nothing compared in between: then it is given up."""

MOST_SECONDS = 900.0
"""Seconds that a backend may spend in the same way on cases that take too long."""

MOST_OWN_ENDS = 3
"""Processes that may end while no backend is asked: then the run ends."""

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
    lost     cases that ended a process, by property and backend
    without  backends that are not asked in a property any more, by property
    ends     processes that a backend has ended since something was compared on it last, and the seconds of cases that
             took too long
    log      what pytest wrote where it could not go on
    """

    planned: dict[str, Property] = field(default_factory=dict)
    lacking: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    gone: dict[str, str] = field(default_factory=dict)
    lost: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    without: dict[str, list[str]] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    waited: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    log: str = ""


class Supervisor:
    """One run of the suite. `session` has no backend: its record and cards are filled with what processes tell. It says
    how long a backend has for a case, and whether another process goes on where one is ended.
    """

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
            "lost": self.course.lost,
        }
        command = [sys.executable, "-P", "-c", START, json.dumps(sys.path), json.dumps(task)]
        limit = self.session.case_limit or CASE_LIMIT
        with Process(command, keys, Watch(self._journal, limit)) as process:
            if any(self._take(message) for message in process.messages()) or keys.presses:
                return False
        at = Place.read(self._journal)
        if process.overdue:
            self.course.waited[at.backend] = self.course.waited.get(at.backend, 0.0) + limit
        self._lost(took_too_long(limit) if process.overdue else how_it_ended(process.status), at)
        done = self.course.planned and len(self.course.done) == len(self.course.planned)
        return self._goes_on and not (done or self.course.log)

    @property
    def _goes_on(self) -> bool:
        """Whether another process follows one that has ended before its time."""
        return self.session.isolated is not False and not self._task["fail_fast"]

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
        for prop in properties:
            name = prop["name"]
            self.course.planned.setdefault(
                name, Property(name, tuple(prop["statements"]), prop["summary"], tuple(prop["premises"]))
            )
            self.course.lacking.setdefault(name, {}).update(prop["lacking"])
        self.session.record.planned = len(self.course.planned)
        self._tell("", len(self.course.done), len(self.course.planned))

    def _settle(self, seen: str) -> None:
        """What came of a property that is done."""
        record = read_record(seen)
        self.session.record.add(dataclasses.replace(record, planned=0, finished=0))
        for name, prop in record.properties.items():
            for backend, tally in prop.tallies.items():
                if tally.cases:
                    self.course.ends.pop(backend, None)
                    self.course.waited.pop(backend, None)
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
            ends, waited = course.ends[at.backend], course.waited.get(at.backend, 0.0)
            if ends >= MOST_ENDS or waited >= MOST_SECONDS:
                cost = f"{ends} processes" if ends >= MOST_ENDS else f"{waited:.0f} s"
                self._give_up(requested_as, f"given up: it has cost {cost} in a row, at last in {at.property}")
        elif at.property:
            self._break(at.property, f"{how} within {BY_ITSELF}, while no backend was asked")
        if not at.backend and (course.ends[""] >= MOST_OWN_ENDS or not course.planned):
            course.log = f"{how} while no backend was asked; the run ends here"

    def _blame(self, at: Place, message: str) -> None:
        """A backend has erred in a case, which it is not asked again. After MOST_CASES of them, or after anything that
        is no generated case, it is not asked in the property any more. The others are.
        """
        if self.session.isolated is False:
            message += "; the run ends here, with --isolate another process would go on"
        self._fail(at.property, at.backend, message, at.case)
        cases = self.course.lost.setdefault(at.property, {}).setdefault(at.backend, [])
        if at.case is not None and is_generated(at.case):
            cases.append(at.case)
            if len(cases) < MOST_CASES and self._goes_on and self._task["replay"] is None:
                return
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


def is_generated(case: str) -> bool:
    """Whether the text of a case is that of a generated one, which comes again in another process."""
    return case.startswith("{")
