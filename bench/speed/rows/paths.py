"""That fast paths are tested: the suite's generated cases reach each of them."""

from __future__ import annotations

from ..row import Count

ROWS = (
    Count(
        "fast-paths-torch",
        "cases, of 200 that Hypothesis draws with a context, that reach each fast path of the PyTorch backend",
        "torch",
        "lyra.speed.contestants.paths_torch:reached",
        {"examples": 200},
        note="Each case is held to the oracle while it is counted. Blocks of queries hold 64 scores here and "
        "pieces of a context 64 elements, so that small cases have several; a wrong value ends the run.",
    ),
)
