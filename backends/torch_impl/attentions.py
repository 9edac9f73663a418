"""What heads look at: their softmax weights over static and live keys in one array, formed on request only."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lyra.spec.array_types import Bool, Float

from .cache import Keys
from .heads import LyraHeads, fold, fold_batch, select, unfold_batch
from .layer import Call, Layer
from .partial import masked_scores
from .static import StaticKV
from .tokens import Packed, Tokens


def unpack(weights: Float[Tensor, "B Hq T K"], packed: Packed, tokens: Tokens, slots: int) -> Float[Tensor, "B Hq T K"]:
    """Weights [B,Hq,T,slots+T] as the caller's tokens stand; 0 in the rows of padding."""
    if packed.source is not None:
        rows = weights.take_along_dim(packed.source[:, None, :, None], dim=2)
        live = rows[..., slots:].take_along_dim(packed.source[:, None, None, :], dim=3)
        weights = torch.cat((rows[..., :slots], live), dim=-1)
    return weights if tokens.mask is None else torch.where(tokens.mask[:, None, :, None] == 1, weights, 0.0)


def attentions(q: Float[Tensor, "B T Hq D"], live: Keys, layer: Layer, call: Call) -> Float[Tensor, "B Hq T K"]:
    """The softmax weights of every head, float32 [B,Hq,T,S+L], static keys first. Clauses STATIC-1, MASKED.

    The arguments are those of `attend_to`, whose softmax this is. A head that does not read the context has 0 in its
    columns; a row that sees nothing is 0.
    """
    device, numbers = q.device.type, layer.numbers
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return attentions(q, live, layer, call)
    queries = fold(q, layer.shape.kv_heads)
    visible = live.visible(call.positions, numbers.window, numbers.rule)
    scores = masked_scores(queries, live.keys, visible, numbers.scale, numbers.softcap)
    if call.static is not None and numbers.heads is not None:
        before = _static_scores(queries, call.static, numbers.heads, numbers.scale, numbers.softcap)
        scores = torch.cat((before, scores), dim=-1)
    top = scores.detach().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 0.0).flatten(1, 2)


def show_slots(weights: Float[Tensor, "*rows K"], shown: Bool[np.ndarray, " S"]) -> Float[Tensor, "*rows all"]:
    """Weights [...,K+L] over the K visible slots of a context, bool [S], and live keys, as [...,S+L]: 0 if hidden."""
    slots = torch.tensor(shown, device=weights.device)
    visible, live = weights.split((int(shown.sum()), weights.shape[-1] - int(shown.sum())), dim=-1)
    columns = weights.new_zeros((*weights.shape[:-1], len(shown)))
    columns[..., slots] = visible
    return torch.cat((columns, live), dim=-1)


def _static_scores(
    queries: Float[Tensor, "B Hkv R T D"], static: StaticKV, heads: LyraHeads, scale: float, softcap: float | None
) -> Float[Tensor, "B Hkv R T S"]:
    """The scores of folded queries over static keys; -inf for vanilla heads."""
    visible = None if static.visible is None else static.visible[:, None, None, None, :]
    folded = fold_batch(select(queries, heads), len(static.keys))
    scores = unfold_batch(masked_scores(folded, static.keys, visible, scale, softcap), queries.shape[2])
    if not heads.everywhere:
        scores = scores.index_select(1, heads.places)
    return torch.where(heads.queries[:, :, None, None], scores, -math.inf)
