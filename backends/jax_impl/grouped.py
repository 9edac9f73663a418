"""Grouped-query attention as a module of its own: MHA, GQA and MQA from the one core, with or without RoPE."""

from __future__ import annotations

from typing import Self

import jax.numpy as jnp
from flax import nnx
from jax import Array

from lyra.spec.attention import AttentionSpec, RopeSpec, grouped

from .cache import LiveCache, bucket, empty_cache, with_room
from .layer import Call, Layer, Parts, numbers_of, run_layer, shape_of
from .modules import Linear, RMSNorm


class GroupedQueryAttention(nnx.Module):
    """Causal self-attention whose query heads share KV heads in groups.

    num_kv_heads=None is MHA, 1 is MQA, any other divisor of num_heads GQA; head_dim=None is hidden_size / num_heads;
    rope=None leaves positions out. Parameters: q_proj [Hq·D,E], k_proj and v_proj [Hkv·D,E], o_proj [E,Hq·D], each
    with a bias if `bias`. Keys and values are never repeated: queries are folded into their KV head's group.
    Raises SpecError for sizes that do not divide. Source: clauses ORDER, ROPE, SCALE and SPLIT-1 of SPEC.md; Ainslie et
    al. 2023, "GQA".
    """

    q_norm: RMSNorm
    k_norm: RMSNorm

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        rope: RopeSpec | None = RopeSpec(theta=10_000.0),  # noqa: B008 (frozen)
        bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.spec = grouped(hidden_size, num_heads, num_kv_heads, head_dim=head_dim, rope=rope, bias=bias)
        queries, keys = num_heads * self.spec.head_dim, self.spec.num_key_value_heads * self.spec.head_dim
        self.q_proj = Linear(hidden_size, queries, bias=bias, rngs=rngs)
        self.k_proj = Linear(hidden_size, keys, bias=bias, rngs=rngs)
        self.v_proj = Linear(hidden_size, keys, bias=bias, rngs=rngs)
        self.o_proj = Linear(queries, hidden_size, bias=bias, rngs=rngs)

    @classmethod
    def from_spec(cls, spec: AttentionSpec, *, rngs: nnx.Rngs) -> Self:
        """The module of any layer without a context: its norms, softcap, window and scale too."""
        sizes = (spec.hidden_size, spec.num_attention_heads, spec.num_key_value_heads)
        module = cls(*sizes, head_dim=spec.head_dim, rope=spec.rope, bias=spec.bias, rngs=rngs)
        module.spec = spec
        if spec.qk_norm is not None:
            module.q_norm = RMSNorm(spec.head_dim, spec.qk_norm.eps)
            module.k_norm = RMSNorm(spec.head_dim, spec.qk_norm.eps)
        return module

    def __call__(
        self,
        x: Array,
        *,
        positions: Array | None = None,
        mask: Array | None = None,
        cache: LiveCache | None = None,
    ) -> tuple[Array, LiveCache]:
        """x [B,T,E] -> output [B,T,E] and the cache with the call's keys and values, to give to the next call.

        positions int [B,T] go on from the cache where none are given, or from 0; mask bool [B,T] is False at padding.
        A cache grows by itself, but not within compiled code, where it must have room (`empty_cache`).
        """
        batch, tokens = x.shape[:2]
        past = 0 if cache is None else cache.length
        if positions is None:
            positions = jnp.broadcast_to(past + jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
        if mask is None:
            mask = jnp.ones((batch, tokens), bool)
        room = self.empty_cache(batch, tokens) if cache is None else cache
        if not isinstance(room.length, Array):
            room = with_room(room, tokens)
        call = Call(positions, mask, None, room, first=cache is None)
        made: tuple[Array, LiveCache] = run_layer(x, self.layer, call)
        return made

    @property
    def layer(self) -> Layer:
        """The submodules, numbers and shape that it computes with."""
        norms = (None, None) if self.spec.qk_norm is None else (self.q_norm, self.k_norm)
        parts = Parts(self.q_proj, self.k_proj, self.v_proj, self.o_proj, *norms)
        return Layer(parts, numbers_of(self.spec), shape_of(self.spec))

    def empty_cache(self, batch: int, tokens: int) -> LiveCache:
        """A cache with nothing in it and room for so many tokens."""
        return empty_cache(batch, self.spec.num_key_value_heads, self.spec.head_dim, bucket(tokens))
