"""What a process holds in memory, as the kernel counts it, and processes of their own for what is measured so."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def alone(measure: Callable[..., Any], *given: Any) -> Any:
    """What a function returns in a new process, in which nothing has been done before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, *given).result()


def forget_peak() -> None:
    """Let the peak, VmHWM, start anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def status() -> dict[str, int]:
    """This process's memory in bytes: VmRSS, its part that is no mapped file, RssAnon, and the largest VmRSS, VmHWM."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines if value.endswith(" kB")}


def held() -> dict[str, int]:
    """The same without what nobody uses any more: garbage, and what the C library keeps of freed memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status()
