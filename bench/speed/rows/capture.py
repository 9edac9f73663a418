"""Rows of capturing a context."""

from __future__ import annotations

from ..row import Contestant, Count, Framework, Race, Rival

MODULE = "lyra.speed.contestants.capture"
TOKENS, CHUNK = 2048, 512
BACKENDS: dict[Framework, str] = {"torch": "PyTorch", "jax": "JAX"}

TIMES = tuple(
    Race(
        f"capture-{backend}",
        f"capturing {TOKENS:,} tokens from the 270M in chunks of {CHUNK}, {name}",
        Contestant(
            f"Lyra, {name}", backend, f"{MODULE}:capture", {"backend": backend, "tokens": TOKENS, "chunk": CHUNK}
        ),
        (
            Rival(Contestant("Hugging Face's prefill", "torch", f"{MODULE}:hugging_face", {"tokens": TOKENS}), 1 / 1.1),
            Rival(
                Contestant(
                    "Hugging Face's prefill in chunks",
                    "torch",
                    f"{MODULE}:hugging_face",
                    {"tokens": TOKENS, "chunk": CHUNK},
                )
            ),
        ),
        rounds=5,
    )
    for backend, name in BACKENDS.items()
)

MEMORY = tuple(
    Count(
        f"capture-memory-{backend}",
        f"what capturing from the 270M in chunks of {CHUNK} adds to a process's memory at its peak, {name}",
        backend,
        "lyra.speed.contestants.capture_memory:peaks",
        {"backend": backend, "chunk": CHUNK, "lengths": [1024, 4096]},
        note="Activations are those of one chunk. What grows with the text are its keys and values: in the cache that "
        "the chunks share, in the pieces that are kept, and in the context that these are joined to; and a mask.",
    )
    for backend, name in BACKENDS.items()
)

ROWS = (*TIMES, *MEMORY)
