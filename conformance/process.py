"""A process that the suite runs in, as seen from the one that started it: what it tells, what it is at, its end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .journal import Place

GRACE = 10.0
"""Seconds that a process has, once it was told to end or has said that it is done, until it is killed."""


class Watch:
    """Looks, through its journal, after how long a process has been at one case."""

    def __init__(self, journal: Path, limit: float) -> None:
        self._journal = journal
        self._limit = limit
        self._written = 0
        self._since = 0.0

    def overdue(self) -> bool:
        """Whether a backend has been asked the same for longer than it may."""
        written = self._journal.stat().st_mtime_ns
        if written != self._written:
            self._written, self._since = written, time.monotonic()
        return time.monotonic() - self._since > self._limit and bool(Place.read(self._journal).backend)


class Process:
    """A process of the suite: `messages` are what it tells. Leaving it ends it, and whatever it has started; so does
    `watch`, which makes it `overdue`.
    """

    def __init__(self, command: list[str], keys: Keys, watch: Watch) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
        # A session of its own: neither the terminal's Ctrl-C nor a signal to the whole group concerns both processes.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )
        self._keys = keys
        self._watch = watch
        self.overdue = False
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """End the process, in its own time unless something went wrong here or Ctrl-C was pressed twice."""
        if kind is None and self._keys.presses < 2 and not self.overdue:
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
                self.overdue = self._watch.overdue()
                if self.overdue:
                    return
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


def took_too_long(limit: float) -> str:
    """The end in words of a process that was at one thing for too long."""
    return f"the process was ended after {limit:g} s (--case-limit)"


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
