"""How query heads are grouped by the KV head they read, and which of them go to Lyra (clause SPLIT).

The folded layout is [B,Hkv,R,T,D]: the R query heads of a KV head and their T tokens stand together, so that one matrix
product per KV head serves them all and keys are never repeated.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from lyra.spec.array_types import Bool, Float, Int
from lyra.spec.attention import AttentionSpec

from .dtype import Given, constant
from .partial import Partial, keep


def fold(q: Float[Array, "B T Hq D"], kv_heads: int) -> Float[Array, "B {kv_heads} R T D"]:
    """[B,T,Hq,D] -> [B,Hkv,R,T,D]; query head h stands at (h // R, h % R). Clause SPLIT-1."""
    batch, tokens, query_heads, head_dim = q.shape
    return q.swapaxes(1, 2).reshape(batch, kv_heads, query_heads // kv_heads, tokens, head_dim)


def unfold(heads: Float[Array, "B Hkv R T D"]) -> Float[Array, "B T Hkv*R D"]:
    """[B,Hkv,R,T,D] -> [B,T,Hq,D], heads in their original order."""
    batch, kv_heads, group, tokens, head_dim = heads.shape
    return heads.reshape(batch, kv_heads * group, tokens, head_dim).swapaxes(1, 2)


def fold_batch(q: Float[Array, "B Hs R T D"], contexts: int) -> Float[Array, "{contexts} Hs (B//{contexts})*R T D"]:
    """[B,Hs,R,T,D] -> [Bc,Hs,B/Bc·R,T,D]: the rows that share a context become queries of it. Clause BATCH-4.

    Of Bc contexts, row b reads number b // (B/Bc): the rows of one stand together.
    """
    batch, kv_heads, group, tokens, head_dim = q.shape
    rows = q.reshape(contexts, batch // contexts, kv_heads, group, tokens, head_dim).swapaxes(1, 2)
    return rows.reshape(contexts, kv_heads, batch // contexts * group, tokens, head_dim)


def unfold_batch(x: Float[Array, "Bc Hs Q T *rest"], group: int) -> Float[Array, "Bc*Q//{group} Hs {group} T *rest"]:
    """[Bc,Hs,B/Bc·R,T,...] -> [B,Hs,R,T,...], the inverse of `fold_batch`; R is `group`."""
    contexts, kv_heads, queries, *rest = x.shape
    rows = x.reshape(contexts, kv_heads, queries // group, group, *rest).swapaxes(1, 2)
    return rows.reshape(contexts * (queries // group), kv_heads, group, *rest)


class LyraHeads(NamedTuple):
    """A head split as arrays, so that a compiled function serves every split with the same number of KV heads.

    queries   [Hkv,R] bool  whether the query head is a Lyra head
    kv_heads  [Hs] int32    the KV heads that Lyra heads read, ascending, as static keys have them
    places    [Hkv] int32   where a KV head stands among these; 0 for those that are not there
    """

    queries: Bool[Given, "Hkv R"]
    kv_heads: Int[Given, " Hs"]
    places: Int[Given, " Hkv"]


def lyra_heads(spec: AttentionSpec) -> LyraHeads | None:
    """The Lyra heads of a layer's split; None where no head goes to Lyra. Clauses SPLIT-2, SPLIT-5."""
    if not spec.lyra_q_heads:
        return None
    flags = np.zeros(spec.num_attention_heads, dtype=bool)
    flags[list(spec.lyra_q_heads)] = True
    queries = flags.reshape(spec.num_key_value_heads, -1)
    kv_heads = np.array(spec.lyra_kv_heads, dtype=np.int32)
    places = np.zeros(spec.num_key_value_heads, dtype=np.int32)
    places[kv_heads] = np.arange(len(kv_heads))
    return LyraHeads(*(constant(part, part.dtype) for part in (queries, kv_heads, places)))


def select(queries: Float[Array, "B Hkv R T D"], heads: LyraHeads) -> Float[Array, "B Hs R T D"]:
    """The folded queries of the KV heads that hold static keys: [B,Hkv,R,T,D] to [B,Hs,R,T,D]."""
    return jnp.take(queries, heads.kv_heads, axis=1, mode="clip")


def spread(partial: Partial, heads: LyraHeads) -> Partial:
    """A Partial of the Hs static KV heads as one of all KV heads, empty for every vanilla head. Clause SPLIT-4.

    Takes [B,Hs,R,T,·], gives [B,Hkv,R,T,·]; of query heads that share a KV head only the Lyra heads keep their part.
    """
    everywhere = Partial(*(jnp.take(field, heads.places, axis=1, mode="clip") for field in partial))
    return keep(everywhere, heads.queries[:, :, None, None])


def blend(
    without: Float[Array, "B Hkv R T D"], with_context: Float[Array, "B Hkv R T D"], share: Float[Given, "B Hkv*R"]
) -> Float[Array, "B Hkv R T D"]:
    """Folded heads [B,Hkv,R,T,D] without and with a context, by share [B,Hq] from 0 to 1, both ends exactly."""
    share = share.reshape(*without.shape[:3], 1, 1)
    return share * with_context + (1 - share) * without
