"""Grouped-query attention as a module of its own: MHA, GQA and MQA from the one core, with or without RoPE."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from lyra.spec.attention import AttentionSpec, RopeSpec, grouped

from .cache import LiveCache, empty_cache
from .layer import Call, layer_of, numbers_of, run_layer, shape_of


class GroupedQueryAttention(nn.Module):
    """Causal self-attention whose query heads share KV heads in groups.

    num_kv_heads=None is MHA, 1 is MQA, any other divisor of num_heads GQA; head_dim=None is hidden_size / num_heads;
    rope=None leaves positions out. Parameters: q_proj [Hq·D,E], k_proj and v_proj [Hkv·D,E], o_proj [E,Hq·D], each
    with a bias if `bias`. Keys and values are never repeated: queries are folded into their KV head's group.
    Raises SpecError for sizes that do not divide. Source: clauses ORDER, ROPE, SCALE and SPLIT-1 of SPEC.md; Ainslie et
    al. 2023, "GQA".
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        rope: RopeSpec | None = RopeSpec(theta=10_000.0),  # noqa: B008 (frozen)
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.spec = grouped(hidden_size, num_heads, num_kv_heads, head_dim=head_dim, rope=rope, bias=bias)
        queries, keys = num_heads * self.spec.head_dim, self.spec.num_key_value_heads * self.spec.head_dim
        self.q_proj = nn.Linear(hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden_size, bias=bias)

    @classmethod
    def from_spec(cls, spec: AttentionSpec) -> Self:
        """The module of any layer without a context: its norms, softcap, window and scale too."""
        sizes = (spec.hidden_size, spec.num_attention_heads, spec.num_key_value_heads)
        module = cls(*sizes, head_dim=spec.head_dim, rope=spec.rope, bias=spec.bias)
        module.spec = spec
        if spec.qk_norm is not None:
            module.q_norm = _NormWeight(spec.head_dim)
            module.k_norm = _NormWeight(spec.head_dim)
        return module

    def forward(
        self,
        x: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        cache: LiveCache | None = None,
    ) -> tuple[torch.Tensor, LiveCache]:
        """x [B,T,E] -> output [B,T,E] and the cache with the call's keys and values, to give to the next call.

        positions int [B,T] go on from the cache where none are given, or from 0; mask bool [B,T] is False at padding.
        """
        batch, tokens = x.shape[:2]
        past = 0 if cache is None else cache.mask.shape[1]
        if positions is None:
            positions = torch.arange(past, past + tokens, device=x.device).expand(batch, tokens)
        if mask is None:
            mask = torch.ones(batch, tokens, dtype=torch.bool, device=x.device)
        spec = self.spec
        if cache is None:
            cache = empty_cache(batch, spec.num_key_value_heads, spec.head_dim, dtype=x.dtype, device=x.device)
        layer = layer_of(dict(self.named_parameters()), numbers_of(spec, device=x.device), shape_of(spec))
        return run_layer(x, layer, Call(positions, mask, None, cache))


class _NormWeight(nn.Module):
    """The weight of an RMSNorm, [D], which stage NORM applies as 1 + w."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(head_dim))
