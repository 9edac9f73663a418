"""How query heads are grouped by the KV head they read, and which of them go to Lyra (clause SPLIT).

The folded layout is [B, Hkv, R, T, D]: the R query heads of a group and their T tokens stand together, so that one
matrix product per KV head serves them all and keys are never repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from lyra.spec.split import HeadSplit


def fold(q: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[B,T,Hq,D] -> [B,Hkv,R,T,D]; query head h stands at (h // R, h % R). Clause SPLIT-1."""
    return q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def unfold(heads: torch.Tensor) -> torch.Tensor:
    """[B,Hkv,R,T,D] -> [B,T,Hq,D], heads in their original order."""
    return heads.permute(0, 3, 1, 2, 4).flatten(2, 3)


def fold_batch(q: torch.Tensor, contexts: int) -> torch.Tensor:
    """[B,G,R,T,D] -> [Bc,G,B/Bc·R,T,D]: the rows that share a context become queries of it. Clause BATCH-4.

    Of Bc contexts, row b reads number b // (B/Bc): the rows of one stand together.
    """
    return q.unflatten(0, (contexts, -1)).transpose(1, 2).flatten(2, 3)


def unfold_batch(x: torch.Tensor, group: int) -> torch.Tensor:
    """[Bc,G,B/Bc·R,T,...] -> [B,G,R,T,...], the inverse of `fold_batch`; R is `group`."""
    return x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1)


class LyraHeads(NamedTuple):
    """Which heads go to Lyra, as the folded layout wants it.

    queries bool [Hkv,R]; groups int [G], the KV heads they read; chosen bool [G,R,1,1], or None where no group is cut.
    """

    queries: torch.Tensor
    groups: torch.Tensor
    chosen: torch.Tensor | None

    @property
    def everywhere(self) -> bool:
        """Whether every KV head is read by a Lyra head."""
        return len(self.groups) == len(self.queries)


def lyra_heads(
    split: HeadSplit | None, query_heads: int, kv_heads: int, device: torch.device | None = None
) -> LyraHeads:
    """The Lyra heads of a split of a layer with these head counts. Clauses SPLIT-2, SPLIT-5."""
    flags = torch.zeros(query_heads, dtype=torch.bool, device=device)
    if split is not None:
        flags[list(split.lyra_q_heads)] = True
    queries = flags.view(kv_heads, -1)
    groups = queries.any(dim=1).nonzero()[:, 0]
    chosen = queries[groups]
    return LyraHeads(queries, groups, None if chosen.all() else chosen[:, :, None, None])
