"""What the suite is at, kept where the end of its process cannot take it along: in a file, written before every check.

A backend may end the process that it runs in. Whoever started that process reads here which property was judged then,
which backend was asked and for which case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

END = "\0"


@dataclass(frozen=True)
class Place:
    """A property, the backend that is asked (none: the suite itself is at work) and the case, if there is one."""

    property: str = ""
    backend: str = ""
    case: str | None = None

    @classmethod
    def read(cls, path: Path) -> Place:
        """The last place that a journal holds; nowhere where it is empty."""
        parts = path.read_text(encoding="utf-8", errors="replace").split(END)
        return cls(parts[0], parts[1], parts[2] or None) if len(parts) > 3 else cls()


class Journal:
    """Where the suite of this process is. Costs nothing until `keep` names a file, some microseconds a check then."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._process = 0
        self._property = ""
        self._backend = ""

    def keep(self, path: Path) -> None:
        """Write to this file from now on."""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        self._process = os.getpid()

    def begin(self, name: str) -> None:
        """A property begins."""
        self._property = name
        self._write(None)

    def end(self) -> None:
        """It is over."""
        self.begin("")

    @contextmanager
    def asking(self, backend: str, case: Callable[[], str] | None = None) -> Iterator[None]:
        """While this lasts, a backend is asked. `case` is called for the text of the case, where that is wanted."""
        if self._file is None or self._backend == backend:
            yield
            return
        self._backend = backend
        self._write(case)
        try:
            yield
        finally:
            self._backend = ""
            self._write(None)

    def _write(self, case: Callable[[], str] | None) -> None:
        if self._file is None or os.getpid() != self._process:  # a copy of this process has no say
            return
        text = END.join([self._property, self._backend, case() if case else "", ""])
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, text.encode("utf-8", "replace"))
