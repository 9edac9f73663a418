"""Generation: a prefill in chunks, then one compiled step a token, whose shapes never change."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax import Array

from lyra.backends.protocol import Sampling

from .finite import finite_rows, locate
from .forward import Graph, decode, next_scores, prefill_all
from .injected import Injected
from .modules import Attached
from .sampling import draw, most_likely
from .tokens import Tokens, pack_left


def generate(
    graph: Graph,
    tokens: Tokens,
    attached: Mapping[int, Attached | Injected],
    max_new_tokens: int,
    stop_ids: Sequence[int],
    on_token: Callable[[np.ndarray], None] | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The continuation of ids [B,T], int64 [B,N]: at each step the most likely token, or one drawn by `sampling`.

    Stops when every row has produced a token of `stop_ids`; rows that stopped earlier repeat theirs. Raises
    NotFiniteError for scores that are NaN or infinite.
    """
    batch = len(tokens.ids)
    if max_new_tokens == 0:
        return np.zeros((batch, 0), np.int64)
    key = jax.random.key(seed)

    def choose(scores: Array) -> np.ndarray:
        fine = finite_rows(scores)
        token = np.asarray(most_likely(scores) if sampling is None else draw(scores, sampling, key, len(made)))
        if not (np.asarray(fine) | stopped).all():
            raise locate(graph, longer(tokens, made), attached)
        return token

    prefilled = prefill_all(graph, pack_left(tokens), attached, room=max_new_tokens)
    hidden, cache = deque(prefilled, maxlen=1).pop()
    made: list[np.ndarray] = []
    stopped = np.zeros(batch, bool)
    made.append(choose(next_scores(graph, hidden)))
    while True:
        if on_token is not None:
            on_token(made[-1].astype(np.int64))
        stopped |= np.isin(made[-1], stop_ids)
        if stopped.all() or len(made) == max_new_tokens:
            return np.stack(made, axis=1).astype(np.int64)
        scores, cache = decode(graph, made[-1], cache, attached)
        made.append(np.where(stopped, made[-1], choose(scores)))


def longer(tokens: Tokens, made: Sequence[np.ndarray]) -> Tokens:
    """Tokens with those that were made of them, int [B] each."""
    ids = np.concatenate([tokens.ids, *(column[:, None].astype(np.int32) for column in made)], axis=1)
    return Tokens(ids, np.pad(tokens.mask, ((0, 0), (0, len(made))), constant_values=True))
