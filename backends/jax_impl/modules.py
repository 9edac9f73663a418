"""The flax.nnx modules that models of every family are made of, with the parameter names and layouts of Hugging Face.

Axes: B rows, T tokens, E hidden_size, F intermediate_size, V vocab_size, Hq query heads, Hkv KV heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from lyra.spec.attention import AttentionSpec
from lyra.spec.model import ModelSpec

from .dtype import store
from .heads import LyraHeads
from .layer import Cache, Call, Layer, Parts, Shape, numbers_of, run_layer, shape_of
from .linear import linear
from .norm import rms_norm
from .sharding import ShardingConfig
from .static import StaticKV
from .visibility import LiveRule

Activation = Callable[[Array], Array]


class Attached(NamedTuple):
    """What a context changes in one layer; every field may be None (no context, every head causal, no Lyra heads).

    blend float32 [B,Hq] says how far Lyra heads are such; None means entirely.
    """

    static: StaticKV | None
    rule: LiveRule | None
    heads: LyraHeads | None
    blend: Array | None = None


class Linear(nnx.Module):
    """x · Wᵀ (+ bias), W [out,in]: the layout of Hugging Face."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(nnx.initializers.lecun_normal(1, 0)(rngs.params(), (outputs, inputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        return linear(x, self.weight[...], None if self.bias is None else self.bias[...])


class RMSNorm(nnx.Module):
    """RMSNorm over the last axis with weight 1 + w."""

    def __init__(self, width: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.zeros(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.weight[...], self.eps)


class Attention(nnx.Module):
    """One attention layer: the parameters, and the same stages that the attention level runs."""

    def __init__(self, spec: AttentionSpec, sharding: ShardingConfig, *, rngs: nnx.Rngs) -> None:
        queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        self.spec, self.sharding = spec, sharding
        self.q_proj = Linear(spec.hidden_size, queries, bias=spec.bias, rngs=rngs)
        self.k_proj = Linear(spec.hidden_size, keys, bias=spec.bias, rngs=rngs)
        self.v_proj = Linear(spec.hidden_size, keys, bias=spec.bias, rngs=rngs)
        self.o_proj = Linear(queries, spec.hidden_size, bias=spec.bias, rngs=rngs)
        if spec.qk_norm is not None:
            self.q_norm = RMSNorm(spec.head_dim, spec.qk_norm.eps)
            self.k_norm = RMSNorm(spec.head_dim, spec.qk_norm.eps)

    def weights(self) -> dict[str, Array]:
        """The parameters by their Hugging Face names."""
        owners = {name: name.split(".") for name in self.spec.weight_shapes()}
        return {name: getattr(getattr(self, owner), kind)[...] for name, (owner, kind) in owners.items()}

    @property
    def parts(self) -> Parts:
        """The submodules, as a layer computes with them."""
        normed = self.spec.qk_norm is not None
        q_norm, k_norm = (self.q_norm, self.k_norm) if normed else (None, None)
        return Parts(self.q_proj, self.k_proj, self.v_proj, self.o_proj, q_norm, k_norm)

    @property
    def shape(self) -> Shape:
        """What compiled code of this layer is specialised to."""
        return shape_of(self.spec)._replace(sharding=self.sharding)

    def __call__(
        self, x: Array, call: Call, attached: Attached | None, trace: dict[str, Array] | None = None
    ) -> tuple[Array, Cache]:
        """Output [B,T,E] for x [B,T,E], and the cache with the call's tokens.

        `trace` is given what every stage makes, as clause ORDER-3 says.
        """
        numbers = numbers_of(self.spec)
        if attached is not None:
            numbers = numbers._replace(rule=attached.rule, heads=attached.heads)
            call = call._replace(static=attached.static, blend=attached.blend)
        made: tuple[Array, Cache] = run_layer(x, Layer(self.parts, numbers, self.shape), call, trace)
        return made


class Embedding(nnx.Module):
    """Token embeddings [V,E], scaled on the way in."""

    def __init__(self, spec: ModelSpec, scale: float, *, rngs: nnx.Rngs) -> None:
        shape = (spec.vocab_size, spec.hidden_size)
        self.weight = nnx.Param(nnx.initializers.normal(spec.hidden_size**-0.5)(rngs.params(), shape, jnp.float32))
        self.scale = scale

    def __call__(self, ids: Array) -> Array:
        taken = jnp.take(self.weight[...], ids, axis=0, mode="clip")
        return taken * jnp.asarray(self.scale, taken.dtype)


class GatedMLP(nnx.Module):
    """The gated feed-forward block: down(activation(gate(x)) · up(x)), the activation in float32."""

    def __init__(self, spec: ModelSpec, activation: Activation, *, rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size, rngs=rngs)
        self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, rngs=rngs)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = (part(x).astype(jnp.float32) for part in (self.gate_proj, self.up_proj))
        return self.down_proj(store(self.activation(gate) * up, x.dtype))
