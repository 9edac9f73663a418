"""What capturing adds to a process's memory at its peak, by the length of the text, in a process of its own."""

from __future__ import annotations

import lyra

from ..row import Counted, Finding
from .capture import text_ids
from .process_memory import alone, forget_peak, held, status

MOST = 6.0
"""Three times a token's keys and values are there at the end: in the cache, in the pieces, in the context. A cache that
grows is there twice for a moment, and a mask for a chunk takes a third of a token's keys and values."""


def peaks(backend: str, chunk: int, lengths: list[int]) -> Counted:
    """The peak of capturing texts of these lengths from the 270M, and what a further token adds to it."""
    added, token = alone(measure, backend, chunk, lengths)
    growth = (added[-1] - added[0]) / (lengths[-1] - lengths[0])
    findings = [
        Finding(f"S = {length:,}: added at the peak", peak, "bytes")
        for length, peak in zip(lengths, added, strict=True)
    ]
    what = "what a further token adds / its keys and values in the context"
    return Counted([*findings, Finding(what, growth / token, "×", at_most=MOST)])


def measure(backend: str, chunk: int, lengths: list[int]) -> tuple[list[int], int]:
    """The peaks in bytes beyond what was there before, and the bytes of a token's keys and values in the context.

    Every length has been captured once before, so that nothing is compiled meanwhile; what the C library keeps of that
    memory is given back before.
    """
    model = lyra.load("gemma-3-270m", backend=backend)
    ids = text_ids(max(lengths))
    added, token = [], 0
    for length in lengths:
        token = model.capture(ids[:length], chunk_size=chunk).nbytes // length
        before = held()["VmRSS"]
        forget_peak()
        model.capture(ids[:length], chunk_size=chunk)
        added.append(status()["VmHWM"] - before)
    return added, token
