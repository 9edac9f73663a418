"""Rows of the whole 270M in JAX, without a context, against plain Hugging Face in PyTorch."""

from __future__ import annotations

from ..row import Contestant, Race, Rival

TOKENS = 512

PRODUCTS = (
    "Most of XLA's time are the products with the weights, which no layout of the operands made faster (as stored, "
    "transposed, both transposed, gate and up in one). Tokens attend in four parts, each to the keys up to its last "
    "one."
)


def contestant(name: str, framework: str, part: str) -> Contestant:
    """A prefill of TOKENS tokens, or a decode step behind them."""
    make = f"lyra.speed.contestants.model_{framework}:plain"
    return Contestant(name, "jax" if framework == "jax" else "torch", make, {"tokens": TOKENS, "part": part})


ROWS = tuple(
    Race(
        f"jax-no-context-{part}",
        f"no context, 270M in JAX: {what}; Hugging Face in PyTorch",
        contestant("Lyra, JAX", "jax", part),
        (Rival(contestant("Hugging Face", "torch", part), 1.0),),
        note=PRODUCTS if part == "prefill" else "",
    )
    for part, what in (("prefill", f"prefill of {TOKENS} tokens"), ("decode", f"decode step behind {TOKENS}"))
)
