"""Several models trained at the same time: a process with one thread for each core.

Products as small as these are not worth a second thread: two threads in one process are slower than one. The processes
share nothing; how far they are is what their checkpoints say.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

from .corpus import Corpus
from .groups import groups
from .training import Task, Trained, steps_done, train

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
"""What a process of the pool has in its environment before it imports a framework."""

LOOK = 1.0
"""Seconds between two looks at how far the processes are, at most."""

Moved = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def train_all(
    tasks: Sequence[Task], corpus: Corpus, folder: Path, processes: int, moved: Moved = lambda *_: None
) -> list[Trained]:
    """Every task's model, trained or read; those that others start from come first.

    One process trains here, more are started. Raises InputError, OSError.
    """
    total = sum(task.recipe.steps for task in tasks)
    waiting = [task for task in tasks if steps_done(task, corpus, folder) < task.recipe.steps]
    if processes > 1 and len(waiting) > 1:
        for stage in groups(waiting, lambda task: task.origin is None).values():
            look = lambda: moved("", sum(steps_done(task, corpus, folder) for task in tasks), total)  # noqa: E731
            _in_processes(stage, corpus, folder, min(processes, len(stage)), look)
        return [train(task, corpus, folder) for task in tasks]
    before, found = 0, []
    for task in tasks:

        def tell(done: int, task: Task = task, before: int = before) -> None:
            moved(f"{task.backend} {task.spec.kind}, seed {task.seed}", before + done, total)

        found.append(train(task, corpus, folder, tell))
        before += task.recipe.steps
    return found


def _in_processes(
    tasks: Sequence[Task], corpus: Corpus, folder: Path, processes: int, look: Callable[[], None]
) -> None:
    """Leave the finished checkpoint of every task in the folder."""
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _enter) as pool:
        try:
            running = {pool.submit(train, task, corpus, folder) for task in tasks}
            while running:
                ended, running = wait(running, LOOK, FIRST_COMPLETED)
                for future in ended:
                    future.result()
                look()
        except BaseException:
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()  # checkpoints are whole at any time
            pool.shutdown(cancel_futures=True)
            raise


def _enter() -> None:
    """What a process of the pool begins with."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it is interrupted, and ends it
    os.environ.update(ONE_THREAD)
