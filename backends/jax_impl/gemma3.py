"""Gemma-3's text model as flax.nnx modules, with the parameter names and layouts of Hugging Face.

Axes: B batch, T tokens, E hidden_size, F intermediate_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lyra.spec.attention import AttentionSpec, RopeSpec
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec

from .cache import LiveCache, bucket, empty_cache
from .dtype import store
from .heads import SplitArrays
from .injected import Block, run_block
from .layer import Cache, Call, Layer, Shape, constants_of, run_layer, shape_of
from .norm import rms_norm
from .partial import HIGHEST
from .rolling import empty_ring
from .rope import inverse_frequencies, turn_once
from .sharding import ShardingConfig
from .static import StaticKV
from .visibility import LiveRule

GELU_TANH = "gelu_pytorch_tanh"
LEAST_ROOM = 512
"""Tokens that a cache has room for at least: texts up to this length share one compiled decode step."""


class Attached(NamedTuple):
    """What a context changes in one layer; every field may be None (no context, every head causal, no Lyra heads).

    gates float32 [B,Hq] say how far Lyra heads are such; None means entirely.
    """

    static: StaticKV | None
    rule: LiveRule | None
    split: SplitArrays | None
    gates: Array | None = None


class ModelCache(NamedTuple):
    """The live cache of every layer, how many real tokens each row has, int32 [B], and live keys of injected blocks."""

    layers: tuple[Cache, ...]
    counts: Array
    blocks: dict[int, LiveCache]


class Captured(NamedTuple):
    """K normed and unrotated, and V, of one layer and call: [B,T,Hkv,D]."""

    k: Array
    v: Array


class Turned(NamedTuple):
    """Queries [B,T,Hq,D] and keys [B,T,Hkv,D] of one layer and call, as heads compare them: normed and rotated."""

    q: Array
    k: Array


class Forward(NamedTuple):
    """hidden [B,T,E], after the last norm; the cache with the call's tokens; of the layers asked for K and V, or Q and
    K as heads compare them.

    finite bool [L+1,B,T] says of which tokens the embedding and each layer's output is finite, if that was asked for.
    """

    hidden: Array
    cache: ModelCache
    captured: Mapping[int, Captured | Turned]
    finite: Array | None = None


class Linear(nnx.Module):
    """x · Wᵀ (+ bias), W [out,in]: the layout of Hugging Face, which a CPU reads in order when one token is decoded."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(nnx.initializers.lecun_normal(1, 0)(rngs.params(), (outputs, inputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32)) if bias else None

    def __call__(self, x: Array) -> Array:
        weight = self.weight[...]
        y = jnp.einsum("bti,oi->bto", x, weight, precision=HIGHEST, preferred_element_type=jnp.float32)
        return store(y if self.bias is None else y + self.bias[...], x.dtype)


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
    def shape(self) -> Shape:
        """What compiled code of this layer is specialised to."""
        return shape_of(self.spec)._replace(sharding=self.sharding)

    def __call__(self, x: Array, call: Call, attached: Attached | None) -> tuple[Array, Cache, tuple[Captured, Turned]]:
        """Output [B,T,E] for x [B,T,E], the cache with the call's tokens, and the call's K and V, Q and K."""
        constants = constants_of(self.spec)
        if attached is not None:
            constants = constants._replace(rule=attached.rule, split=attached.split)
            call = call._replace(static=attached.static, gates=attached.gates)
        output, cache, trace = run_layer(x, Layer(self.weights(), constants, self.shape), call)
        captured = Captured(trace.get("k_norm", trace["k_proj"]), trace["v_proj"])
        q = trace.get("q_norm", trace["q_proj"])
        return output, cache, (captured, Turned(trace.get("q_rope", q), trace.get("k_rope", captured.k)))


class MLP(nnx.Module):
    """The gated feed-forward block: down(gelu(gate(x)) · up(x))."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        self.gate_proj = Linear(spec.hidden_size, spec.intermediate_size, rngs=rngs)
        self.up_proj = Linear(spec.hidden_size, spec.intermediate_size, rngs=rngs)
        self.down_proj = Linear(spec.intermediate_size, spec.hidden_size, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        gate, up = (part(x).astype(jnp.float32) for part in (self.gate_proj, self.up_proj))
        return self.down_proj(store(jax.nn.gelu(gate, approximate=True) * up, x.dtype))


class DecoderLayer(nnx.Module):
    """Attention and feed-forward block, each between two norms, each added to the residual stream."""

    def __init__(self, spec: ModelSpec, index: int, sharding: ShardingConfig, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.self_attn = Attention(spec.layer(index).replace(split=None), sharding, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.mlp = MLP(spec, rngs=rngs)
        self.post_feedforward_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def __call__(
        self, x: Array, call: Call, attached: Attached | Block | None, memory: LiveCache | None
    ) -> tuple[Array, Cache, tuple[Captured, Turned], LiveCache | None]:
        """The residual stream [B,T,E] behind this layer, its cache, its K and V, Q and K, and its block's live keys."""
        of_heads = attached if isinstance(attached, Attached) else None
        attended, cache, captured = self.self_attn(self.input_layernorm(x), call, of_heads)
        x = x + self.post_attention_layernorm(attended)
        if isinstance(attached, Block):
            call = call._replace(turn=None)  # a block may have another RoPE
            x, memory = run_block(attached, x, self.block_weights(), self.self_attn.shape, call, cache, memory)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return x, cache, captured, memory

    def block_weights(self) -> dict[str, Array]:
        """The weights that an injected block takes from its layer. Clause SEQUENTIAL-7."""
        norms = {"input_norm": self.input_layernorm, "output_norm": self.post_attention_layernorm}
        return {f"{name}.weight": norm.weight[...] for name, norm in norms.items()} | self.self_attn.weights()


class Embedding(nnx.Module):
    """Token embeddings [V,E], scaled by √E on the way in."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs) -> None:
        shape = (spec.vocab_size, spec.hidden_size)
        self.weight = nnx.Param(nnx.initializers.normal(spec.hidden_size**-0.5)(rngs.params(), shape, jnp.float32))
        self.scale = spec.hidden_size**0.5

    def __call__(self, ids: Array) -> Array:
        taken = jnp.take(self.weight[...], ids, axis=0, mode="clip")
        return taken * jnp.asarray(self.scale, taken.dtype)


class Gemma3(nnx.Module):
    """A Gemma-3 text model with its language head."""

    def __init__(self, spec: ModelSpec, sharding: ShardingConfig | None = None, *, rngs: nnx.Rngs) -> None:
        """Random parameters. Raises InputError for another activation than gelu_pytorch_tanh."""
        if spec.hidden_activation != GELU_TANH:
            raise InputError(f"hidden_activation is {spec.hidden_activation!r}; this model has {GELU_TANH!r} only")
        self.spec, self.sharding = spec, sharding or ShardingConfig.no_sharding()
        self.embed_tokens = Embedding(spec, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(spec, index, self.sharding, rngs=rngs) for index in range(spec.num_hidden_layers)]
        )
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.lm_head = None if spec.tie_word_embeddings else Linear(spec.hidden_size, spec.vocab_size, rngs=rngs)

    def __call__(
        self,
        ids: Array,
        mask: Array,
        cache: ModelCache,
        attached: Mapping[int, Attached | Block],
        *,
        capture: Collection[int] = (),
        turned: bool = False,
        first: bool = False,
        watch: bool = False,
    ) -> Forward:
        """Run the decoder over ids [B,T], mask [B,T]; real tokens stand side by side (clause POSITION-4).

        `capture` names layers whose K and V are returned, or Q and K if `turned`; `first` says that the cache is empty;
        `watch` asks for what is finite.
        """
        positions = jnp.maximum(cache.counts[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        x = self.embed_tokens(ids)
        turns = {rope: turn_once(positions, frequencies) for rope, frequencies in self._frequencies().items()}
        captured: dict[int, Captured | Turned] = {}
        caches, blocks, stages = [], dict(cache.blocks), [x]
        for index, (layer, past) in enumerate(zip(self.layers, cache.layers, strict=True)):
            turn = turns.get(layer.self_attn.spec.rope)
            call, memory = Call(positions, mask, None, past, first, turn=turn), cache.blocks.get(index)
            x, past, found, memory = layer(x, call, attached.get(index), memory)
            caches.append(past)
            stages.append(x)
            if memory is not None:
                blocks[index] = memory
            if index in capture:
                captured[index] = found[turned]
        counts = cache.counts + mask.sum(axis=1, dtype=jnp.int32)
        finite = jnp.stack([jnp.isfinite(stage).all(axis=-1) for stage in stages]) if watch else None
        return Forward(self.norm(x), ModelCache(tuple(caches), counts, blocks), captured, finite)

    def _frequencies(self) -> dict[RopeSpec | None, Array]:
        """Those of every RoPE that the layers have."""
        found = {layer.self_attn.spec.rope: inverse_frequencies(layer.self_attn.spec) for layer in self.layers}
        return {rope: frequencies for rope, frequencies in found.items() if frequencies is not None}

    def logits(self, hidden: Array) -> Array:
        """hidden [..., E] to logits [..., V]."""
        weight = (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]
        logits = jnp.einsum("...e,ve->...v", hidden, weight, precision=HIGHEST, preferred_element_type=jnp.float32)
        cap = self.spec.final_softcap
        return logits if cap is None else jnp.tanh(logits / cap) * cap


def empty_model_cache(
    spec: ModelSpec, batch: int, tokens: int, dtype: np.dtype[Any], blocks: Collection[int] = ()
) -> ModelCache:
    """An empty cache with room for `tokens` tokens a row, and for no fewer than LEAST_ROOM.

    `blocks` names layers with an injected block that has live keys of its own.
    """

    room = bucket(max(tokens, LEAST_ROOM))

    def of_heads(layer: AttentionSpec) -> LiveCache:
        return empty_cache(batch, layer.num_key_value_heads, layer.head_dim, room, dtype)

    def of_layer(layer: AttentionSpec) -> Cache:
        if layer.sliding_window is None:
            return of_heads(layer)
        window = min(layer.sliding_window, room)  # a window may be wider than any text
        return empty_ring(batch, layer.num_key_value_heads, layer.head_dim, window, dtype)

    layers = tuple(of_layer(spec.layer(index)) for index in range(spec.num_hidden_layers))
    remembered = {index: of_heads(spec.layer(index)) for index in blocks}
    return ModelCache(layers, jnp.asarray(np.zeros(batch, np.int32)), remembered)
