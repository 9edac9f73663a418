"""The worker processes as the frame sees them: one for each framework, of which one works at a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from threading import Timer
from types import TracebackType
from typing import Any, Self

from .row import Framework


class WorkerError(RuntimeError):
    """Something went wrong in a worker; the message is its traceback."""


class OutOfReach(WorkerError):
    """What was asked for would take this machine too long."""


class Workers:
    """Worker processes by framework, started when they are first needed and ended with the block.

    `until`, a time of `time.monotonic`, is when the work of now has to be done; None where there is no hurry.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.until: float | None = None
        self._running: dict[Framework, subprocess.Popen[str]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():
            assert process.stdin is not None
            process.stdin.close()
        for process in self._running.values():
            process.wait()
        self._running.clear()

    @property
    def left(self) -> float:
        """Seconds until the work of now has to be done."""
        return math.inf if self.until is None else max(0.0, self.until - time.monotonic())

    def ask(self, framework: Framework, do: str, **options: Any) -> Any:
        """What a method of the framework's Worker returns.

        Raises WorkerError, and OutOfReach where the answer does not come in time; the worker is ended then.
        """
        process = self._process(framework)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"do": do, "with": options}) + "\n")
        process.stdin.flush()
        late = None if self.until is None else Timer(self.left, process.kill)
        if late is not None:
            late.start()
        line = process.stdout.readline()
        if late is not None:
            late.cancel()
        if not line and late is not None and self.left == 0:
            del self._running[framework]
            process.wait()
            raise OutOfReach(f"{do} was not done in time")
        if not line:
            del self._running[framework]  # the next row gets a new one
            raise WorkerError(f"the {framework} worker ended with code {process.wait()} while it was asked to {do}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{framework} worker, {do}:\n{answer['error']}")
        return answer["result"]

    @property
    def processes(self) -> list[int]:
        """The ids of the running workers."""
        return [process.pid for process in self._running.values()]

    def drop(self) -> None:
        """Let every running worker free its contestants."""
        for framework in self._running:
            self.ask(framework, "drop")

    def _process(self, framework: Framework) -> subprocess.Popen[str]:
        if framework not in self._running:
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": str(self.threads),
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "TRANSFORMERS_VERBOSITY": "error",
            }
            self._running[framework] = subprocess.Popen(
                [sys.executable, "-P", "-m", "lyra.speed.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                encoding="utf-8",
            )
        return self._running[framework]
