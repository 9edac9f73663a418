"""Drawing the next token: temperature, then top-k, then top-p, as `Sampling` says."""

from __future__ import annotations

import torch

from lyra.backends.protocol import Sampling

HEAD = 1024
"""Top-p orders so many of the most probable tokens, and the whole vocabulary only where they do not suffice."""


def most_likely(scores: torch.Tensor) -> torch.Tensor:
    """The token of the highest score, int64 [B] for scores [B,V]; the first one of several."""
    return scores.argmax(dim=-1)


def draw(scores: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """A token for each row of scores [B,V], int64 [B], from the distribution that `filtered` leaves."""
    return torch.multinomial(filtered(scores, sampling).softmax(dim=-1), 1, generator=generator)[:, 0]


def filtered(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores [B,V] as float32 over the temperature, the highest being 0; -inf for tokens that are left out."""
    scores = scores.float()
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        scores = kept(scores, scores >= highest(scores, sampling.top_k).amin(dim=-1, keepdim=True))
    if sampling.top_p < 1:
        scores = kept(scores, nucleus(scores.softmax(dim=-1), sampling.top_p))
    return scores


def kept(scores: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Scores [B,V], -inf where `keep` [B,V] is False."""
    return scores.masked_fill(~keep, -torch.inf)


def highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The highest `count` values of each row of [B,V], or all of them, in descending order."""
    return values.topk(min(count, values.shape[-1])).values


def nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Which tokens of [B,V] top-p keeps, bool [B,V]: the fewest most probable that reach it, and ties."""
    few = highest(probabilities, HEAD)
    if bool((few.sum(dim=-1) < top_p).any()):
        return probabilities >= least_kept(probabilities.sort(descending=True).values, top_p)
    return probabilities >= least_kept(few, top_p)


def least_kept(ordered: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability that top-p keeps, [B,1], of probabilities [B,N] in descending order.

    The first one is kept even where `top_p` is so small that float32 has 0 for it.
    """
    before = ordered.cumsum(dim=-1) - ordered
    kept_ones = ordered.masked_fill(before >= top_p, torch.inf)
    return torch.minimum(kept_ones.amin(dim=-1, keepdim=True), ordered[..., :1])
