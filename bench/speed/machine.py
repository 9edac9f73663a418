"""What this machine can do: its read bandwidth and the rate of its matrix products, measured where the rows run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BUFFER = 1 << 30
"""Bytes that are read: more than caches hold."""

WIDTH = 2048
"""Of the square matrices that are multiplied."""

READS, PRODUCTS = 5, 5


def probe() -> dict[str, float]:
    """Bytes read a second, and floating-point operations a second of products in float32 and bfloat16.

    Bandwidth is that of the fastest of two plain reads, a sum and a product with one vector; each is the median of a
    few runs.
    """
    import torch

    buffer = _buffer()
    rows, vector = buffer.view(-1, 4096), torch.ones(4096)
    read = min(_seconds(buffer.sum, READS), _seconds(lambda: torch.mv(rows, vector), READS))
    rates = {"bandwidth": BUFFER / read}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(WIDTH, WIDTH, dtype=dtype)
        seconds = _seconds(partial(torch.mm, matrix, matrix), PRODUCTS)
        rates[str(dtype).removeprefix("torch.")] = 2 * WIDTH**3 / seconds
    return rates


def describe() -> dict[str, Any]:
    """The processor and the versions that the figures belong to."""
    names = ("torch", "transformers", "jax", "flax", "peft", "numpy")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


class Others:
    """How busy other processes than these, and this one, keep the machine; always 0 where /proc does not say."""

    def __init__(self, own: list[int]) -> None:
        self.own = [os.getpid(), *own]
        self.reset()

    def reset(self) -> None:
        """Count from now on."""
        self._began, self._busy = time.perf_counter(), self._ticks()

    def cores(self) -> float:
        """Cores that others have used on average since `reset`."""
        if self._busy is None or (now := self._ticks()) is None:
            return 0.0
        elapsed = time.perf_counter() - self._began
        return max(0.0, (now - self._busy - 1) / os.sysconf("SC_CLK_TCK") / elapsed)

    def _ticks(self) -> int | None:
        """Clock ticks that all processes but the own ones have used, since the system started."""
        try:
            user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
            own = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.own]
        except OSError:
            return None
        return user + nice + system - sum(int(one[11]) + int(one[12]) for one in own)


@cache
def _buffer() -> torch.Tensor:
    import torch

    return torch.ones(BUFFER // 4)


def _seconds(run: Callable[[], object], count: int) -> float:
    taken = []
    for _ in range(count):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return median(taken)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
