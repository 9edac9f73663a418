"""What heads look at: their softmax weights over static and live keys in one array, formed on request only."""

from __future__ import annotations

import math

import numpy as np
import torch

from .heads import LyraHeads, fold_batch, unfold_batch
from .partial import masked_scores
from .static import PreparedStatic


def attentions(
    queries: torch.Tensor,
    k: torch.Tensor,
    visible: torch.Tensor | None,
    static: PreparedStatic | None,
    lyra: LyraHeads,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """The softmax weights of every head, float32 [B,Hq,T,S+L], static keys first. Clauses STATIC-1, MASKED.

    queries [B,Hkv,R,T,D]; k and visible are the live keys' and go as in `partial_attention`, whose softmax this is. A
    head that does not read the context has 0 in its columns; a row that sees nothing is 0.
    """
    device = queries.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return attentions(queries, k, visible, static, lyra, scale, softcap)
    scores = masked_scores(queries, k, visible, scale, softcap)
    if static is not None:
        scores = torch.cat((_static_scores(queries, static, lyra, scale, softcap), scores), dim=-1)
    top = scores.detach().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 0.0).flatten(1, 2)


def show_slots(weights: torch.Tensor, shown: np.ndarray) -> torch.Tensor:
    """Weights [...,K+L] over the K visible slots of a context, bool [S], and live keys, as [...,S+L]: 0 if hidden."""
    slots = torch.tensor(shown, device=weights.device)
    visible, live = weights.split((int(shown.sum()), weights.shape[-1] - int(shown.sum())), dim=-1)
    columns = weights.new_zeros((*weights.shape[:-1], len(shown)))
    columns[..., slots] = visible
    return torch.cat((columns, live), dim=-1)


def _static_scores(
    queries: torch.Tensor, static: PreparedStatic, lyra: LyraHeads, scale: float, softcap: float | None
) -> torch.Tensor:
    """The scores of queries [B,Hkv,R,T,D] over static keys, [B,Hkv,R,T,S]; -inf for vanilla heads."""
    visible = None if static.visible is None else static.visible[:, None, None, None, :]
    picked = queries.index_select(1, lyra.groups)
    scores = masked_scores(fold_batch(picked, len(static.k)), static.k, visible, scale, softcap)
    scores = unfold_batch(scores, queries.shape[2])
    if lyra.chosen is not None:
        scores = torch.where(lyra.chosen, scores, -math.inf)
    every = scores.new_full((*queries.shape[:-1], scores.shape[-1]), -math.inf)
    return every.index_copy(1, lyra.groups, scores)
