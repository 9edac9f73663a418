"""What this machine can do: its read bandwidth and the rate of its matrix products, measured where the rows run."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
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
"""Of the square matrices that are multiplied, at most."""

NARROW = 128
"""Their width where the machine is slow; it is doubled as long as all products together are done in time."""

TIME = 2.0
"""Seconds that the products of one dtype may take: some processors have none in bfloat16, where PyTorch multiplies
element by element, a hundred times slower than in float32."""

READS, PRODUCTS = 5, 5


def probe(products: Sequence[str] = ("float32",)) -> dict[str, float]:
    """Bytes read a second, and floating-point operations a second of products in some dtypes.

    Bandwidth is that of the fastest of two plain reads, a sum and a product with one vector; each is the median of a
    few runs. Where products of WIDTH would take too long, the rate is that of smaller ones, and "float32 width", or
    that of the other dtype, says how wide they were.
    """
    import torch

    buffer = _buffer()
    rows, vector = buffer.view(-1, 4096), torch.ones(4096)
    read = min(_seconds(buffer.sum, READS), _seconds(lambda: torch.mv(rows, vector), READS))
    rates = {"bandwidth": BUFFER / read}
    for name in products:
        rates[name], width = rate_of_products(name)
        if width < WIDTH:
            rates[f"{name} width"] = width
    return rates


def rate_of_products(dtype: str, time_limit: float = TIME) -> tuple[float, int]:
    """Floating-point operations a second of the widest products that are done in time, and how wide these were."""
    import torch

    width = NARROW
    while True:
        matrix = torch.ones(width, width, dtype=getattr(torch, dtype))
        once = _seconds(partial(torch.mm, matrix, matrix), 2)
        wider = 8 * once * PRODUCTS  # twice the width, eight times the operations
        if width == WIDTH or wider > time_limit:
            return 2 * width**3 / _seconds(partial(torch.mm, matrix, matrix), PRODUCTS), width
        width *= 2


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
            user, nice, system = map(int, Path("/proc/stat").read_text(encoding="utf-8").split(maxsplit=4)[1:4])
            own = [Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split() for pid in self.own]
        except OSError:
            return None
        return user + nice + system - sum(int(fields[11]) + int(fields[12]) for fields in own)


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
