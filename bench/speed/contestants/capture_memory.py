"""What capturing adds to a process's memory at its peak, by the length of the text, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lyra

from ..row import Counted, Finding
from .capture import text_ids
from .context_memory import held, status

MOST = 6.0
"""Three times a token's keys and values are there at the end: in the cache, in the pieces, in the context. A cache that
grows is there twice for a moment, and a mask for a chunk takes a third of a token's keys and values."""


def peaks(backend: str, chunk: int, lengths: list[int]) -> Counted:
    """The peak of capturing texts of these lengths from the 270M, and what a further token adds to it."""
    words = [sys.executable, "-P", "-m", __name__, backend, str(chunk), *map(str, lengths)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    growth = (found["peaks"][-1] - found["peaks"][0]) / (lengths[-1] - lengths[0])
    named = [
        Finding(f"S = {one:,}: added at the peak", peak, "bytes")
        for one, peak in zip(lengths, found["peaks"], strict=True)
    ]
    what = "what a further token adds / its keys and values in the context"
    return Counted([*named, Finding(what, growth / found["token"], "×", at_most=MOST)])


def measure(backend: str, chunk: int, lengths: list[int]) -> dict[str, object]:
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
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
        model.capture(ids[:length], chunk_size=chunk)
        added.append(status()["VmHWM"] - before)
    return {"peaks": added, "token": token}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), [int(one) for one in sys.argv[3:]])))
