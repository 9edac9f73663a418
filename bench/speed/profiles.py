"""Where the time of a run goes, by the framework's own profiler: what a missed row is shown with."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .row import Framework

SHOWN = 6
"""Operations, at most."""

Shares = list[tuple[str, float]]
"""Operations and their share of the time that all take, the largest first."""


def shares(framework: Framework, run: Callable[[], object]) -> Shares:
    """Run once and say which operations took the time. One that waits for others it started is left out."""
    spent = (_torch if framework == "torch" else _jax)(run)
    total = sum(spent.values())
    return [(name, time / total) for name, time in spent.most_common(SHOWN)]


def _torch(run: Callable[[], object]) -> Counter[str]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return Counter({event.key: event.self_cpu_time_total for event in seen.key_averages()})


def _jax(run: Callable[[], object]) -> Counter[str]:
    """XLA's operations by name, without their numbers, on the threads that it computes with."""
    import jax

    spent: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                for line in plane.lines:
                    for event in line.events if line.name.startswith("tf_XLA") else ():
                        if re.fullmatch(r"[a-z][\w.-]*", event.name):
                            spent[re.sub(r"[.\d]+$", "", event.name)] += round(event.duration_ns)
    return spent
