"""Query heads by KV head, and which of them are Lyra heads (clause SPLIT)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lyra.spec.attention import AttentionSpec

from .dtype import constant
from .partial import Partial


class SplitArrays(NamedTuple):
    """A head split as arrays, so that a compiled function serves every split with the same number of KV heads.

    lyra     [Hq] bool   whether the query head is a Lyra head
    readers  [G] int32   the KV heads that Lyra heads read, ascending: axis G of the static keys
    slots    [Hkv] int32 where a KV head stands on axis G; 0 for KV heads that are not there
    """

    lyra: Array
    readers: Array
    slots: Array


def split_arrays(spec: AttentionSpec) -> SplitArrays | None:
    """The arrays of the spec's split; None where no head goes to Lyra. Clause SPLIT."""
    if not spec.lyra_q_heads:
        return None
    lyra = np.zeros(spec.num_attention_heads, dtype=bool)
    lyra[list(spec.lyra_q_heads)] = True
    readers = np.array(spec.lyra_kv_heads, dtype=np.int32)
    slots = np.zeros(spec.num_key_value_heads, dtype=np.int32)
    slots[readers] = np.arange(len(readers))
    return SplitArrays(*(constant(part, part.dtype) for part in (lyra, readers, slots)))


def fold(heads: Array, kv_heads: int) -> Array:
    """[B,T,Hq,D] to [B,Hkv,R·T,D]: the R query heads of a KV head become one axis with their tokens. SPLIT-1."""
    batch, tokens, query_heads, head_dim = heads.shape
    return heads.swapaxes(1, 2).reshape(batch, kv_heads, query_heads // kv_heads * tokens, head_dim)


def unfold(folded: Array, query_heads: int) -> Array:
    """[B,Hkv,R·T,D] back to [B,T,Hq,D]."""
    batch, kv_heads, queries, head_dim = folded.shape
    tokens = queries * kv_heads // query_heads
    return folded.reshape(batch, query_heads, tokens, head_dim).swapaxes(1, 2)


def join_tokens(folded: Sequence[Partial], group: int) -> Partial:
    """Partials of folded queries [B,Hkv,R·t,·], whose tokens stand behind each other, as one; R is `group`."""

    def joined(*fields: Array) -> Array:
        apart = [field.reshape(*field.shape[:2], group, -1, field.shape[-1]) for field in fields]
        return lax.collapse(jnp.concatenate(apart, axis=3), 2, 4)

    return folded[0] if len(folded) == 1 else Partial(*map(joined, *folded))


def fold_visible(visible: Array, query_heads: int, kv_heads: int) -> Array:
    """Visibility [B, 1 or Hq, T, L] for folded queries: [B, 1 or Hkv, R·T, L]."""
    batch, heads, tokens, keys = visible.shape
    group = query_heads // kv_heads
    if heads == 1:
        visible = jnp.broadcast_to(visible, (batch, group, tokens, keys))
    return visible.reshape(batch, heads if heads == 1 else kv_heads, group * tokens, keys)


def select_readers(folded: Array, split: SplitArrays) -> Array:
    """The folded queries of the KV heads that hold static keys: [B,Hkv,Q,D] to [B,G,Q,D]."""
    return jnp.take(folded, split.readers, axis=1, mode="clip")


def spread_readers(partial: Partial, split: SplitArrays, tokens: int) -> Partial:
    """A Partial of the G static KV heads as one of all KV heads, empty for every vanilla head. Clause SPLIT-4.

    Takes [B,G,R·T,·], gives [B,Hkv,R·T,·]; in a group that the split cuts, only the Lyra heads keep their part.
    """
    kv_heads = split.slots.shape[0]
    lyra = jnp.repeat(split.lyra, tokens).reshape(1, kv_heads, -1, 1)
    out, maximum, total = (jnp.take(part, split.slots, axis=1, mode="clip") for part in partial)
    return Partial(jnp.where(lyra, out, 0.0), jnp.where(lyra, maximum, -jnp.inf), jnp.where(lyra, total, 0.0))


def blend(without: Array, with_context: Array, gates: Array) -> Array:
    """Folded heads [B,Hkv,R·T,D] without and with a context, by gates [B,Hq] from 0 to 1, both ends exactly."""
    batch, kv_heads, queries, _ = without.shape
    share = jnp.repeat(gates, queries * kv_heads // gates.shape[1], axis=1).reshape(batch, kv_heads, queries, 1)
    return share * with_context + (1 - share) * without
