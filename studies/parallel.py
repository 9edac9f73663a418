"""Several models trained at the same time: a process with one thread for each core.

Products as small as these are not worth a second thread: two threads in one process are slower than one.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from .corpus import Corpus
from .training import Task, Trained, finished, train

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
"""What a process of the pool has in its environment before it imports a framework."""

LOOK = 0.3
"""Seconds between two looks at how far the processes are."""

Moved = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

_shared: list[Any] = []
"""In a process of the pool: the count of steps done by all, and whether to stop."""


class Stopped(Exception):
    """The run was interrupted; what is done is in the checkpoint."""


def train_all(
    tasks: Sequence[Task], corpus: Corpus, folder: Path, processes: int, moved: Moved = lambda *_: None
) -> list[Trained]:
    """Every task's model, trained or read. One process trains here, more are started. Raises InputError, OSError."""
    total = sum(task.recipe.steps for task in tasks)
    waiting = [task for task in tasks if not finished(task, corpus, folder)]
    if processes > 1 and len(waiting) > 1:
        before = total - sum(task.recipe.steps for task in waiting)
        tell = partial(_told, moved, "", before, total)
        _in_processes(waiting, corpus, folder, min(processes, len(waiting)), tell)
        return [train(task, corpus, folder) for task in tasks]
    before, found = 0, []
    for task in tasks:
        tell = partial(_told, moved, f"{task.backend} {task.spec.kind}, seed {task.seed}", before, total)
        found.append(train(task, corpus, folder, tell))
        before += task.recipe.steps
    return found


def _in_processes(
    tasks: Sequence[Task], corpus: Corpus, folder: Path, processes: int, moved: Callable[[int], None]
) -> None:
    """Leave the finished checkpoint of every task in the folder."""
    context = multiprocessing.get_context("spawn")
    done, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(processes, context, _enter, (done, stop)) as pool:
        try:
            running = {pool.submit(_train, task, corpus, folder) for task in tasks}
            while running:
                ended, running = wait(running, LOOK, FIRST_COMPLETED)
                for future in ended:
                    future.result()
                moved(done.value)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _enter(*shared: Any) -> None:
    """What a process of the pool begins with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is interrupted, and tells it to stop
    os.environ.update(ONE_THREAD)
    _shared[:] = shared


def _train(task: Task, corpus: Corpus, folder: Path) -> None:
    done, stop = _shared
    last = 0

    def moved(now: int) -> None:
        nonlocal last
        if stop.is_set():
            raise Stopped
        with done.get_lock():
            done.value += now - last
        last = now

    train(task, corpus, folder, moved)


def _told(moved: Moved, what: str, before: int, total: int, done: int) -> None:
    moved(what, before + done, total)
