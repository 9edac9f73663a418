"""Rows of the same layer in JAX: against Hugging Face in PyTorch, against the PyTorch backend, and over what grows."""

from __future__ import annotations

from typing import Any

from ..row import Contestant, Race, Rival
from .layer import LIVE, STATIC, contestant, costs, floor, hugging_face
from .layer import lyra as in_torch

MODULE = "lyra.speed.contestants.layer_jax"

PRODUCTS = (
    "XLA reads keys at the speed of memory for a few queries and multiplies more of them more slowly than PyTorch's "
    "library does. Values of a context lie as columns, one for each key: that takes a tenth to a fifth less time than "
    "rows, at every batch, as long as XLA is kept from turning the product about. Live values stay rows, which are "
    "faster where each row of the batch has its own."
)


def lyra(name: str = "Lyra, JAX", **options: Any) -> Contestant:
    """Lyra's layer; `options` are those of its contestant."""
    return contestant(name, "jax", f"{MODULE}:lyra", **options)


DECODE = (
    Race(
        "jax-decode-batch-1",
        f"decode step, 12B-shaped global layer, S = {STATIC:,}, {LIVE} live, batch 1, in JAX",
        lyra(),
        (Rival(hugging_face(), 2.2), Rival(in_torch())),
        floor(at_most=1.7),
        quick=True,
    ),
    *(
        Race(
            f"jax-decode-batch-{batch}",
            f"the same, batch {batch}",
            lyra(batch=batch),
            (
                Rival(hugging_face(batch=batch)),
                Rival(in_torch(batch=batch), 1 / 1.5),
                Rival(lyra("Lyra, JAX, a context in each row", batch=batch, contexts=batch)),
            ),
            floor(batch=batch),
            note=PRODUCTS if batch == 16 else "",
        )
        for batch in (8, 16)
    ),
)

LONG = Race(
    "jax-decode-long",
    "the same, S = 32,768, batch 1; cost per static token against that at S = 8,192",
    lyra("Lyra, JAX, S = 32,768", static=4 * STATIC),
    (
        Rival(hugging_face("Hugging Face SDPA, S = 32,768", static=4 * STATIC)),
        Rival(lyra("Lyra, JAX, S = 8,192"), 1 / 1.15, per=STATIC, own_per=4 * STATIC),
    ),
    floor(4 * STATIC),
)

PREFILL = tuple(
    Race(
        f"jax-prefill-{tokens}",
        f"prefill of {tokens:,} live tokens against S = {STATIC:,}, the same layer in JAX",
        lyra(live=tokens, tokens=tokens),
        (
            Rival(hugging_face(live=tokens, tokens=tokens), 1.4),
            Rival(in_torch(live=tokens, tokens=tokens)),
        ),
        floor(live=tokens, tokens=tokens),
        rounds=9,
        note=""
        if tokens < 1000
        else "The products with the context are most of it, and XLA's take longer than MKL's. Tokens attend to live "
        "keys in four parts, each to those up to its last token, so that three eighths of the scores of the new tokens "
        "with each other are left out.",
    )
    for tokens in (128, 1024)
)

ROWS = (*DECODE, LONG, *PREFILL, *costs("jax-", " in JAX", lyra, in_torch))
