"""Memory that a prefill against a context needs beside its inputs and result, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile

from ..row import Counted, Finding
from .layer_torch import hugging_face, lyra

MEBIBYTE = 1 << 20


def peak(run: Callable[[], object]) -> int:
    """The most bytes that a run has allocated and not yet freed, at any moment."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    kineto = seen.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def prefill(tokens: list[int], static: list[int], at_most: float) -> Counted:
    """Peak bytes for every number of live tokens and slots; a context four times as long may take `at_most` as much."""
    found: dict[str, dict[tuple[int, int], int]] = {"Lyra": {}, "Hugging Face SDPA": {}}
    for count in tokens:
        for slots in static:
            for name, make in zip(found, (lyra, hugging_face), strict=True):
                found[name][count, slots] = peak(make(slots, count, tokens=count).run)
    table = [["live tokens", *(f"{name}, S = {slots:,}" for name in found for slots in static)]]
    for count in tokens:
        cells = (by_slots[count, slots] for by_slots in found.values() for slots in static)
        table.append([f"{count:,}", *(f"{value / MEBIBYTE:,.0f} MiB" for value in cells)])
    own = found["Lyra"]
    findings = [
        Finding(
            f"peak at {count:,} tokens, S = {static[-1]:,} / S = {static[0]:,}",
            own[count, static[-1]] / own[count, static[0]],
            "×",
            at_most=at_most,
        )
        for count in tokens
    ]
    return Counted(findings, table)
