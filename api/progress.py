"""Progress bars for long steps: on standard error, and only where a person is looking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Steps = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


@contextmanager
def steps(title: str) -> Iterator[Steps]:
    """A progress bar while the block runs; what it yields moves it. Silent where standard error is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, what="")

        def move(what: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, what=what)

        yield move
