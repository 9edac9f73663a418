"""The scores behind a problem's outputs: what premises about large, small and hidden scores look at."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lyra.spec.reference import Stream, by_head, context_end, static_keys, visible_live

from .case import Problem
from .subject import expected


class Scored(NamedTuple):
    """Scores [B,h,T,L] of some heads, softcap and mask not applied, and which of them these see [B,h,T,L].

    Queries at padding see nothing here, since their outputs are not specified.
    """

    score: np.ndarray
    seen: np.ndarray

    @property
    def top(self) -> np.ndarray:
        """The largest visible score of every query [B,h,T], -inf where it sees nothing."""
        return np.max(np.where(self.seen, self.score, -np.inf), axis=-1, initial=-np.inf)

    @property
    def low(self) -> np.ndarray:
        """The lowest visible score of every query [B,h,T], inf where it sees nothing."""
        return np.min(np.where(self.seen, self.score, np.inf), axis=-1, initial=np.inf)

    @property
    def hidden_top(self) -> np.ndarray:
        """The largest score that is hidden from every query [B,h,T], -inf where nothing is."""
        return np.max(np.where(self.seen, -np.inf, self.score), axis=-1, initial=-np.inf)


def scored(problem: Problem) -> list[Scored]:
    """The scores of vanilla heads and of Lyra heads, static keys before live ones. Computed once per problem."""
    if "scores" not in problem.memo:
        problem.memo["scores"] = _scored(problem)
    found: list[Scored] = problem.memo["scores"]
    return found


def _scored(problem: Problem) -> list[Scored]:
    spec, static, stages = problem.spec, problem.entered.static, expected(problem)
    last = "rope" if spec.rope is not None else "norm" if spec.qk_norm is not None else "proj"
    live = visible_live(spec, problem.positions, problem.mask)
    # RoPE is relative: static keys P behind meet queries at t as they do where they are, and live ones P further on.
    stream = Stream(
        stages[f"q_{last}"], stages[f"k_{last}"], static_keys(spec, static, context_end(spec, static)[:, None])
    )
    lyra = np.isin(np.arange(spec.num_attention_heads), spec.lyra_q_heads)
    found = []
    for heads, mode, context in ((~lyra, "causal", None), (lyra, spec.static.live, static)):
        if heads.any():
            query, key, _, seen = by_head(spec, np.flatnonzero(heads), stream, stages["v_proj"], live[mode], context)
            with np.errstate(over="ignore", invalid="ignore"):
                score = np.nan_to_num(query.value @ key.value.swapaxes(-1, -2) * spec.scale)
            found.append(Scored(score, np.broadcast_to(seen & problem.mask[:, None, :, None], score.shape)))
    return found
