"""The worker processes: one for each framework, of which one works at a time, makes contestants and times them."""

from __future__ import annotations

import gc
import importlib
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self

from .profiles import Shares, shares
from .row import Contestant, Framework, Work

LONG = 2.0
"""Seconds of a run that is warmed up by one."""

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""What a worker has in its environment before it imports a framework, beside its number of threads."""


class WorkerError(RuntimeError):
    """Something went wrong in a worker; the message is its traceback."""


class OutOfReach(WorkerError):
    """What was asked for would take this machine too long."""


class Failed(NamedTuple):
    """The answer of a worker that raised an error: its traceback."""

    traceback: str


def named(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


class Worker:
    """What a worker can be asked for; the contestants that it has made."""

    def __init__(self) -> None:
        self.made: list[tuple[Contestant, Work]] = []

    def make(self, contestant: Contestant) -> float:
        """Make a contestant, once, and run it before anything is timed: kernels are compiled and memory is touched.

        Returns about how many seconds a run takes: those of a second one, where that is no long wait.
        """
        if all(contestant != other for other, _ in self.made):
            self.made.append((contestant, named(contestant.make)(**contestant.options)))
        seconds = self.time(contestant, 1)[0]
        return seconds if seconds > LONG else self.time(contestant, 1)[0]

    def time(self, contestant: Contestant, count: int) -> list[float]:
        """Seconds of each of `count` runs."""
        work, taken = self._work(contestant), []
        for _ in range(count):
            if work.before is not None:
                work.before()
            started = time.perf_counter()
            work.run()
            taken.append(time.perf_counter() - started)
        return taken

    def profile(self, contestant: Contestant) -> Shares:
        """What share of a run's own time each of the framework's operations takes, the largest first."""
        work = self._work(contestant)
        if work.before is not None:
            work.before()
        return shares(contestant.framework, work.run)

    def drop(self) -> None:
        """Forget all contestants and free their memory."""
        self.made.clear()
        gc.collect()

    def call(self, make: str, options: Mapping[str, Any]) -> Any:
        """What a function returns."""
        return named(make)(**options)

    def _work(self, contestant: Contestant) -> Work:
        return next(work for other, work in self.made if other == contestant)


def serve(requests: Connection, threads: int) -> None:
    """Answer requests until there are no more; what libraries print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it is interrupted, and ends it
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads))
    os.dup2(2, 1)
    worker = Worker()
    with suppress(EOFError):
        while True:
            method, given = requests.recv()
            try:
                answer = getattr(worker, method)(*given)
            except Exception:
                answer = Failed(traceback.format_exc())
            requests.send(answer)


class Workers:
    """Worker processes by framework, started when they are first needed and ended with the block.

    `until`, a time of `time.monotonic`, is when the work of now has to be done; None where there is no hurry.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.until: float | None = None
        self._running: dict[Framework, tuple[Any, Connection]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for framework, (process, _) in list(self._running.items()):
            if kind is not None:
                process.kill()
            self._end(framework)

    @property
    def left(self) -> float:
        """Seconds until the work of now has to be done."""
        return math.inf if self.until is None else max(0.0, self.until - time.monotonic())

    def ask(self, framework: Framework, method: str, *given: Any) -> Any:
        """What a method of the framework's Worker returns.

        Raises WorkerError, and OutOfReach where the answer does not come in time; the worker is ended then.
        """
        if framework not in self._running:
            self._running[framework] = self._started()
        process, requests = self._running[framework]
        try:
            requests.send((method, given))
            if not requests.poll(None if self.until is None else self.left):
                process.kill()
                raise OutOfReach(f"{method} was not done in time")
            answer = requests.recv()
        except (EOFError, OSError, OutOfReach) as error:
            code = self._end(framework)  # the next row gets a new one
            if isinstance(error, OutOfReach):
                raise
            raise WorkerError(f"the {framework} worker ended with code {code} while it was asked to {method}") from None
        if isinstance(answer, Failed):
            raise WorkerError(f"{framework} worker, {method}:\n{answer.traceback}")
        return answer

    @property
    def processes(self) -> list[int]:
        """The ids of the running workers."""
        return [process.pid for process, _ in self._running.values()]

    def drop(self) -> None:
        """Let every running worker free its contestants."""
        for framework in list(self._running):
            self.ask(framework, "drop")

    def _started(self) -> tuple[Any, Connection]:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(there, self.threads))
        process.start()
        there.close()  # so that the end of the worker is the end of the pipe
        return process, here

    def _end(self, framework: Framework) -> int | None:
        process, requests = self._running.pop(framework)
        requests.close()
        process.join()
        code: int | None = process.exitcode
        return code
