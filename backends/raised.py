"""What somebody else's code raised, in one line of our own; and whether Ctrl-C was pressed, or that code said so."""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

LONGEST = 600
"""Characters of a message that are quoted."""


class _Interrupt:
    """Whether SIGINT came since it is watched for."""

    came = False
    watched = False


def raised(error: BaseException) -> str:
    """The type of an error and what it says, in one line, whatever its own `__str__` does."""
    try:
        said = " ".join(str(error).split())
    except BaseException:
        said = "its message cannot be read"
    if len(said) > LONGEST:
        said = f"{said[:LONGEST]}…"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def last_frame(error: BaseException, package: str) -> str:
    """Where in the modules of a package an error came from, the last place of several; else where it came from at all.

    `package` is the name of a module, of which what stands before the first dot counts.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return _place(error.filename, error.lineno)
    top = package.partition(".")[0]
    ours: list[tuple[str, int]] = []
    others: list[tuple[str, int]] = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        if module == __name__ or module == f"{__package__}.registry" or frame.f_code.co_filename.startswith("<frozen"):
            continue
        (ours if module.partition(".")[0] == top else others).append((frame.f_code.co_filename, line))
    return _place(*(ours or others)[-1]) if ours or others else f"module {package}"


def ends_the_process(error: BaseException) -> bool:
    """Whether an error is meant to end more than a call: SystemExit, a KeyboardInterrupt that nobody pressed, a test
    framework's outcome, whatever else is no Exception.
    """
    return not isinstance(error, Exception)


@contextmanager
def interrupts_watched() -> Iterator[None]:
    """While this lasts, `interrupted` knows whether Ctrl-C was pressed, which does what it did before.

    Nothing to know in a thread: signals do not come to it.
    """
    before = signal.getsignal(signal.SIGINT)
    if _Interrupt.watched or threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def pressed(number: int, frame: FrameType | None) -> None:
        press()
        before(number, frame)

    _Interrupt.came, _Interrupt.watched = False, True
    signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        _Interrupt.watched = False
        if signal.getsignal(signal.SIGINT) is pressed:
            signal.signal(signal.SIGINT, before)


def interrupted(error: BaseException) -> bool:
    """Whether an error is the user's Ctrl-C, and no KeyboardInterrupt that some code has raised by itself."""
    return isinstance(error, KeyboardInterrupt) and _Interrupt.came


def only_told() -> None:
    """From now on no signal is the user's Ctrl-C: only `press` says that it was pressed."""
    _Interrupt.watched = True


def press() -> None:
    """Take the next KeyboardInterrupt for the user's."""
    _Interrupt.came = True


def _place(file: str, line: int | None) -> str:
    """A line of a file, its name as short as it gets from here."""
    with suppress(OSError):  # the working folder may be gone
        if file.startswith(os.getcwd() + os.sep):
            file = os.path.relpath(file)
    return f"{file}, line {line}" if line else file
