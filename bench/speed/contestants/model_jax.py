"""The real Gemma-3 270M in JAX, without a context: what the engine calls for a prefill and for a decode step."""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lyra.backends.jax_impl import JaxBackend, forward
from lyra.backends.jax_impl.tokens import Tokens, pack_left
from lyra.checkpoint import resolve

from ..row import Work

ROOM = 64
"""Tokens that a cache has room for behind the prefilled ones."""


def plain(tokens: int, part: Literal["prefill", "decode"]) -> Work:
    """A prefill of random tokens up to the scores of the next one, or one decode step behind it."""
    graph = forward.split_module(_engine().module)
    ids = np.random.default_rng(tokens).integers(1000, 200_000, (1, tokens)).astype(np.int32)
    packed = pack_left(Tokens(ids, np.ones(ids.shape, dtype=bool)))

    def prefill() -> Any:
        hidden, held = deque(forward.prefill_all(graph, packed, {}, room=ROOM), maxlen=1).pop()
        jax.block_until_ready(forward.next_scores(graph, hidden))
        return held

    if part == "prefill":
        return Work(prefill)
    prefilled, given = prefill(), list[Any]()

    def before() -> None:
        """A step uses its cache up."""
        given[:] = [jax.block_until_ready(jax.tree.map(jnp.copy, prefilled))]

    def step() -> None:
        jax.block_until_ready(forward.decode(graph, ids[:, -1], given.pop(), {}))

    return Work(step, before)


@cache
def _engine() -> Any:
    return JaxBackend().load(str(resolve("gemma-3-270m")))
