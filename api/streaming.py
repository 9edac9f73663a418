"""Turning a call that reports pieces through a callback into an iterator over these pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Queue
from threading import Thread
from typing import Any


class _ClosedError(Exception):
    """Nobody listens any more: unwinds the running call."""


def iterate(run: Callable[[Callable[[str], None]], Any]) -> Iterator[str]:
    """The pieces that `run(emit)` emits, as they come, from a thread of its own.

    An error of the call is raised here, after its pieces. Closing the iterator ends the call at its next piece.
    """
    pieces: Queue[str | BaseException | None] = Queue()
    closed = False

    def emit(piece: str) -> None:
        if closed:
            raise _ClosedError
        pieces.put(piece)

    def work() -> None:
        try:
            run(emit)
        except _ClosedError:
            pass
        except BaseException as error:
            pieces.put(error)
        pieces.put(None)

    worker = Thread(target=work, daemon=True)
    worker.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        closed = True
        worker.join()
