"""Rows of capturing a context."""

from __future__ import annotations

from ..row import Contestant, Framework, Race, Rival

MODULE = "lyra.speed.contestants.capture"
TOKENS, CHUNK = 2048, 512
BACKENDS: dict[Framework, str] = {"torch": "PyTorch", "jax": "JAX"}

ROWS = tuple(
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
