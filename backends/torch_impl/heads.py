"""How query heads are grouped by the KV head they read, and which of them go to Lyra (clause SPLIT).

The folded layout is [B, Hkv, R, T, D]: the R query heads of a KV head and their T tokens stand together, so that one
matrix product per KV head serves them all and keys are never repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lyra.spec.array_types import Bool, Float, Int
from lyra.spec.attention import AttentionSpec

from .partial import Partial, keep


def fold(q: Float[torch.Tensor, "B T Hq D"], kv_heads: int) -> Float[torch.Tensor, "B {kv_heads} R T D"]:
    """[B,T,Hq,D] -> [B,Hkv,R,T,D]; query head h stands at (h // R, h % R). Clause SPLIT-1."""
    return q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def unfold(heads: Float[torch.Tensor, "B Hkv R T D"]) -> Float[torch.Tensor, "B T Hkv*R D"]:
    """[B,Hkv,R,T,D] -> [B,T,Hq,D], heads in their original order."""
    return heads.permute(0, 3, 1, 2, 4).flatten(2, 3)


def fold_batch(
    q: Float[torch.Tensor, "B Hs R T D"], contexts: int
) -> Float[torch.Tensor, "{contexts} Hs (B//{contexts})*R T D"]:
    """[B,Hs,R,T,D] -> [Bc,Hs,B/Bc·R,T,D]: the rows that share a context become queries of it. Clause BATCH-4.

    Of Bc contexts, row b reads number b // (B/Bc): the rows of one stand together.
    """
    return q.unflatten(0, (contexts, -1)).transpose(1, 2).flatten(2, 3)


def unfold_batch(
    x: Float[torch.Tensor, "Bc Hs Q T *rest"], group: int
) -> Float[torch.Tensor, "Bc*Q//{group} Hs {group} T *rest"]:
    """[Bc,Hs,B/Bc·R,T,...] -> [B,Hs,R,T,...], the inverse of `fold_batch`; R is `group`."""
    return x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)


class LyraHeads(NamedTuple):
    """Which heads go to Lyra, as the folded layout wants it.

    queries    bool [Hkv,R]: whether the query head is a Lyra head
    kv_heads   int [Hs]: the KV heads that Lyra heads read, ascending, as static keys have them
    places     int [Hkv]: where a KV head stands among these; 0 for those that are not there
    everyone   whether every query head is one, so that none has to be left out
    """

    queries: Bool[torch.Tensor, "Hkv R"]
    kv_heads: Int[torch.Tensor, " Hs"]
    places: Int[torch.Tensor, " Hkv"]
    everyone: bool

    @property
    def everywhere(self) -> bool:
        """Whether every KV head is read by a Lyra head."""
        return len(self.kv_heads) == len(self.queries)


def lyra_heads(spec: AttentionSpec, *, device: torch.device | None = None) -> LyraHeads | None:
    """The Lyra heads of a layer's split; None where no head goes to Lyra. Clauses SPLIT-2, SPLIT-5."""
    if not spec.lyra_q_heads:
        return None
    flags = torch.zeros(spec.num_attention_heads, dtype=torch.bool, device=device)
    flags[list(spec.lyra_q_heads)] = True
    queries = flags.view(spec.num_key_value_heads, -1)
    kv_heads = queries.any(dim=1).nonzero()[:, 0]
    places = torch.zeros(spec.num_key_value_heads, dtype=torch.long, device=device)
    places[kv_heads] = torch.arange(len(kv_heads), device=device)
    return LyraHeads(queries, kv_heads, places, bool(queries.all()))


def select(queries: Float[torch.Tensor, "B Hkv R T D"], heads: LyraHeads) -> Float[torch.Tensor, "B Hs R T D"]:
    """The folded queries of the KV heads that hold static keys: [B,Hkv,R,T,D] to [B,Hs,R,T,D]."""
    return queries if heads.everywhere else queries.index_select(1, heads.kv_heads)


def spread(partial: Partial, heads: LyraHeads) -> Partial:
    """A Partial of the Hs static KV heads as one of all KV heads, empty for every vanilla head. Clause SPLIT-4.

    Takes [B,Hs,R,T,·], gives [B,Hkv,R,T,·]; of query heads that share a KV head only the Lyra heads keep their part.
    """
    if not heads.everywhere:
        partial = Partial(*(field.index_select(1, heads.places) for field in partial))
    return partial if heads.everyone else keep(partial, heads.queries.unsqueeze(-1).unsqueeze(-1))


def blend(
    without: Float[torch.Tensor, "B Hkv R T D"],
    with_context: Float[torch.Tensor, "B Hkv R T D"],
    share: Float[torch.Tensor, "B Hkv*R"],
) -> Float[torch.Tensor, "B Hkv R T D"]:
    """Folded heads [B,Hkv,R,T,D] without and with a context, by share [B,Hq] from 0 to 1, both ends exactly."""
    return torch.lerp(without, with_context, share.unflatten(1, without.shape[1:3])[..., None, None])
