"""The process of one framework: makes contestants, and times them when it is told to. One JSON line a request."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, cast

from .profiles import Shares, shares
from .row import Counted, Framework, Work

LONG = 2.0
"""Seconds of a run that is warmed up by one."""


def named(name: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


class Worker:
    """The contestants that have been made, by number, and what can be asked for."""

    def __init__(self) -> None:
        self.works: dict[int, Work] = {}

    def make(self, number: int, make: str, options: Mapping[str, Any]) -> float:
        """Make a contestant and run it before anything is timed: kernels are compiled and memory is touched.

        Returns about how many seconds a run takes: those of a second one, where that is no long wait.
        """
        self.works[number] = cast("Work", named(make)(**options))
        seconds = self.time(number, 1)[0]
        return seconds if seconds > LONG else self.time(number, 1)[0]

    def time(self, number: int, count: int) -> list[float]:
        """Seconds of each of `count` runs."""
        work, taken = self.works[number], []
        for _ in range(count):
            if work.before is not None:
                work.before()
            started = time.perf_counter()
            work.run()
            taken.append(time.perf_counter() - started)
        return taken

    def profile(self, number: int, profiled: Framework) -> Shares:
        """What share of a run's own time each of the framework's operations takes, the largest first."""
        work = self.works[number]
        if work.before is not None:
            work.before()
        return shares(profiled, work.run)

    def drop(self) -> None:
        """Forget all contestants and free their memory."""
        self.works.clear()
        gc.collect()

    def call(self, make: str, options: Mapping[str, Any]) -> Any:
        """What a function returns, as plain data."""
        found = named(make)(**options)
        if isinstance(found, Counted):
            return {"findings": [asdict(one) for one in found.findings], "table": found.table}
        return found


def main() -> None:
    """Answer requests on standard input until it ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(worker, request["do"])(**request["with"])}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
