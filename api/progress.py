"""How far long steps are: a bar where a person is looking, and now and then a line where standard error is a file.

A bar shows at once what is being done. Lines come late, so that short steps say nothing, and rarely; but none of them
waits for the next step, since it is the long ones that people ask about.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .terminal import console, visible

Steps = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

FIRST, CHANGED, SAME = 10.0, 20.0, 60.0
"""Seconds until the first line, from a line to one that says something new, and to one that says the same again."""

LOOK = 0.5
"""Seconds between two looks at whether a line is due."""


@contextmanager
def steps(title: str, *, at_once: bool = False) -> Iterator[Steps]:
    """What is yielded is told how far the block is, and shows it on standard error.

    Where that is no terminal, lines are written. With `at_once` one is written whenever another thing is being done;
    what stands behind ": " is only about how far that is.
    """
    printer = console(stderr=True, file=sys.stderr)  # of now: the block may send it elsewhere, as the suite does
    if not printer.is_terminal:
        with _lines(_Told(title, printer), at_once) as move:
            yield move
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}", markup=False),
    )
    with Progress(*columns, console=printer, transient=True) as bar:
        task = bar.add_task(visible(title), total=None, what="")

        def move(what: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, what=visible(what))

        yield move


def about(seconds: float) -> str:
    """A time for people, as exactly as they want it: 8 s, 3 min, 2 h 10 min."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class _Told:
    """What has been said in lines, and what could be said next."""

    def __init__(self, title: str, printer: Console) -> None:
        self.title, self.printer = title, printer
        self.began = self.last = time.monotonic()
        self.what, self.done, self.total = "", 0, 0
        self.said: str | None = None

    def due(self) -> bool:
        """Whether it is time for a line."""
        waited = time.monotonic() - self.last
        if self.said is None:
            return waited >= FIRST
        return waited >= (CHANGED if self.state() != self.said else SAME)

    def thing(self) -> tuple[str, int]:
        """What is being done, without how far it is."""
        return self.what.partition(": ")[0], self.done

    def state(self) -> str:
        """What is being done, without how long it has taken."""
        counted = f"{self.done:,} of {self.total:,} done" if self.total else ""
        return ", ".join(filter(None, (visible(self.what), counted)))

    def say(self) -> None:
        """Write a line. A closed or full standard error is no reason to end."""
        spent = time.monotonic() - self.began
        times = [f"{about(spent)} so far"] if spent >= 1 else []
        if 0 < self.done < self.total and spent >= 1:
            times.append(f"about {about(spent / self.done * (self.total - self.done))} left")
        self.said, self.last = self.state(), time.monotonic()
        with suppress(OSError, ValueError):
            self.printer.print(
                f"{visible(self.title)}: {', '.join(filter(None, (self.said, *times)))}",
                soft_wrap=True,
                highlight=False,
            )


@contextmanager
def _lines(told: _Told, at_once: bool) -> Iterator[Steps]:
    """The same in lines, written by a thread beside the block."""
    ended = Event()

    def watch() -> None:
        while not ended.wait(LOOK):
            if told.due():
                told.say()

    def move(what: str, done: int, total: int) -> None:
        thing = told.thing()
        told.what, told.done, told.total = what, done, total
        if at_once and told.thing() != thing:
            told.say()

    watcher = Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield move
    finally:
        ended.set()
        watcher.join()
