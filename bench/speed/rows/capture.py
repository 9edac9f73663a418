"""Rows of capturing a context."""

from __future__ import annotations

from typing import Any

from ..row import BACKENDS, Contestant, Count, Race, Rival

MODULE = "lyra.speed.contestants.capture"
TOKENS, CHUNK = 2048, 512
OF_LYRA = {"tokens": TOKENS, "chunk": CHUNK}


def prefill(name: str, **options: Any) -> Rival:
    """Hugging Face's prefill of the same tokens."""
    bound = None if options else 1 / 1.1
    return Rival(Contestant(name, "torch", f"{MODULE}:hugging_face", {"tokens": TOKENS, **options}), bound)


TIMES = tuple(
    Race(
        f"capture-{backend}",
        f"capturing {TOKENS:,} tokens from the 270M in chunks of {CHUNK}, {name}",
        Contestant(
            f"Lyra, {name}", backend, f"{MODULE}:capture", {"backend": backend, "tokens": TOKENS, "chunk": CHUNK}
        ),
        (prefill("Hugging Face's prefill"), prefill("Hugging Face's prefill in chunks", chunk=CHUNK)),
        rounds=5,
    )
    for backend, name in BACKENDS.items()
)

MEMORY = tuple(
    Count(
        f"capture-memory-{backend}",
        f"what capturing from the 270M in chunks of {CHUNK} adds to a process's memory at its peak, {name}",
        backend,
        f"{MODULE}_memory:peaks",
        {"backend": backend, "chunk": CHUNK, "lengths": [1024, 4096]},
        note="Activations are those of one chunk. What grows with the text are its keys and values: in the cache that "
        "the chunks share, in the pieces that are kept, and in the context that these are joined to; and a mask.",
    )
    for backend, name in BACKENDS.items()
)

ROWS = (*TIMES, *MEMORY)
