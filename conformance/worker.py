"""The process that backends run in, for `lyra conform`: started by `supervisor`, to which it tells what it sees as it
goes. It may end at any moment by something that a backend does; what it had told by then is kept.

Messages are lines of JSON on what was standard output. What backends print goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from lyra.backends.protocol import Backend, BackendEnded, BackendNotFound, get_backend, known_backends
from lyra.backends.raised import only_told, press
from lyra.spec.errors import InputError

from .journal import Journal
from .judge import lacking
from .launch import settled, unlike
from .record_transfer import serialize_record
from .runner import run
from .session import Card, Profile, Session


@dataclass(frozen=True)
class Task:
    """What a process of the suite is to do: the options of `lyra conform`, and what others before it have done.

    names    backends as they were asked for; none means every installed one
    gone     those of them that are not to be loaded any more
    done     properties that are settled
    without  backends, by property, that are not asked there any more
    lost     cases, by property and backend, that are not asked again
    """

    names: Sequence[str]
    profile: Profile
    seed: int
    spec: str | None
    shard: str | None
    database: str | None
    fail_fast: bool
    replay: str | None
    only: str | None
    journal: str
    gone: Sequence[str] = ()
    done: Sequence[str] = ()
    without: Mapping[str, Sequence[str]] | None = None
    lost: Mapping[str, Mapping[str, Sequence[str]]] | None = None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Task:
        """The task that plain data describe."""
        return cls(**{**fields, "profile": Profile(**fields["profile"])})


class Channel:
    """The way to the process that started this one."""

    def __init__(self) -> None:
        """Take standard output for messages and standard input for the end; give backends something else for each."""
        self._out, self._in = os.dup(1), os.dup(0)
        os.dup2(2, 1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        self._process = os.getpid()
        self._lock = threading.Lock()

    def tell(self, kind: str, **fields: Any) -> None:
        """Send a message; a process that a backend has forked sends none."""
        if os.getpid() != self._process:
            return
        line = (json.dumps({"kind": kind, **fields}) + "\n").encode()
        with self._lock:
            while line:
                line = line[os.write(self._out, line) :]

    def obey(self) -> None:
        """Interrupt this process, as Ctrl-C would, once its standard input ends: then the other process wants no more,
        or is gone.
        """
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        while os.read(self._in, 1):
            pass
        press()
        main = threading.main_thread().ident
        if main is not None and hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, signal.SIGINT)
        else:
            import _thread

            _thread.interrupt_main()


class Teller:
    """A pytest plugin that tells what is planned, and of each property what was seen, as it ends."""

    def __init__(self, channel: Channel, session: Session) -> None:
        self._channel = channel
        self._session = session

    def pytest_collection_finish(self) -> None:
        """What all processes of this run together are to do."""
        self._channel.tell(
            "planned",
            properties=[
                {
                    "name": name,
                    "statements": declaration.statements,
                    "summary": declaration.summary,
                    "premises": [premise.name for premise in declaration.premises],
                    "lacking": {
                        backend.name: self._lacking(backend, declaration.needs) for backend in self._session.backends
                    },
                }
                for name, declaration in self._session.planned.items()
            ],
        )

    def _lacking(self, backend: Backend, needs: Sequence[str]) -> list[str]:
        with self._session.journal.asking(backend.name):
            return lacking(backend, needs)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """One more is done."""
        self._channel.tell("property", seen=serialize_record(self._session))


def main(text: str) -> None:
    """Do the task that a JSON text describes, and tell how it goes."""
    only_told()
    channel = Channel()
    task = Task.from_dict(json.loads(text))
    journal = Journal()
    journal.keep(Path(task.journal))
    channel.obey()
    session: Session | None = None
    try:
        session = settled(
            profile=task.profile,
            seed=task.seed,
            spec=task.spec,
            shard=task.shard,
            database=Path(task.database) if task.database is not None else None,
        )
        session.journal = journal
        session.done = frozenset(task.done)
        session.without = task.without or {}
        session.lost = task.lost or {}
        work(task, session, channel)
    except InputError as error:
        channel.tell("refused", message=str(error))
    except KeyboardInterrupt:
        seen = serialize_record(session) if session is not None else ""
        channel.tell("ended", exit_code=int(pytest.ExitCode.INTERRUPTED), log="", seen=seen)


def work(task: Task, session: Session, channel: Channel) -> None:
    """Load the backends and run the suite. Raises InputError."""
    load(task, session, channel)
    outcome = run(
        session,
        fail_fast=task.fail_fast,
        replay=task.replay,
        only=task.only,
        plugins=[Teller(channel, session)],
    )
    if outcome.refused is not None:
        raise InputError(outcome.refused)
    channel.tell("ended", exit_code=outcome.exit_code, log=outcome.log, seen=serialize_record(session))


def load(task: Task, session: Session, channel: Channel) -> None:
    """Load the backends of a task into its session; what ends the process instead is told. Raises InputError."""
    found: dict[str, Backend] = {}
    missing: list[str] = []
    ended = False
    for name in dict.fromkeys(task.names or sorted(known_backends())):
        if name in task.gone:
            continue
        try:
            with session.journal.asking(name):
                found[name] = get_backend(name)
                card = Card.of(found[name])
            channel.tell("backend", requested_as=name, **asdict(card))
        except BackendEnded as error:
            ended = True
            channel.tell("unloadable", requested_as=name, message=str(error))
        except (BackendNotFound, ImportError) as error:
            if task.names or not isinstance(error, ImportError):
                raise InputError(str(error)) from None
            missing.append(str(error))
    if not (found or ended or task.gone):
        raise InputError("no backend can be loaded: " + "; ".join(missing or ["none is installed"]))
    session.backends = unlike(found)
    session.requested_as = {backend.name: name for name, backend in found.items()} if task.names else {}
