"""Many faults, several at a time: the suite is one process, so a few of them each try one fault after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from lyra.conformance.launch import prepare_environment

from .catalogue import Fault, FaultError
from .kill import Verdict, kill

TURN = 40
"""Faults that one process tries: what JAX compiles for a faulty copy stays mapped, and there is room for about 140."""


def kill_all(
    work: Sequence[tuple[Fault, str]], profile: str = "smoke", seed: int = 0, workers: int = 1
) -> Iterator[tuple[int, Verdict]]:
    """What becomes of every fault in its backend, as `kill` says: the place in `work` and the verdict, as they come.

    Raises what `kill` raises; faults that have not begun then are dropped.
    """
    for start in range(0, len(work), TURN * workers):
        turn = range(start, min(start + TURN * workers, len(work)))
        # Not forked: threads of a framework do not survive that.
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=prepare_environment) as pool:
            futures = {pool.submit(kill, *work[place], profile, seed): place for place in turn}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool:
                ended = [work[place] for future, place in futures.items() if lost(future)][: 2 * workers]
                named = ", ".join(f"{fault.id} in {name}" for fault, name in ended)
                raise FaultError(f"a process ended within a fault, one of {named}; try each with --only") from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def lost(future: Future[Verdict]) -> bool:
    """Whether a fault has no verdict because its process, or one beside it, has ended."""
    return future.done() and not future.cancelled() and isinstance(future.exception(), BrokenProcessPool)
