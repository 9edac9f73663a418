"""A decoder of any family: embedding, layers, last norm and language head, and the cache that all of them share.

What is a family's own says its spec, or its module in `families`. Axes: B rows, T tokens, E hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lyra.spec import families as spec_families
from lyra.spec.attention import AttentionSpec, RopeSpec
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec

from . import families
from .cache import LiveCache, bucket, empty_cache
from .decoder_layer import DecoderLayer
from .injected import Injected
from .layer import Cache, Call
from .modules import Attached, Embedding, Linear
from .partial import HIGHEST
from .rolling import empty_ring
from .rope import inverse_frequencies, turn_once
from .sharding import ShardingConfig

LEAST_ROOM = 512
"""Tokens that a cache has room for at least: texts up to this length share one compiled decode step."""


class ModelCache(NamedTuple):
    """The live cache of every layer, how many real tokens each row has, int32 [B], and live keys of injected blocks."""

    layers: tuple[Cache, ...]
    counts: Array
    blocks: dict[int, LiveCache]


class Captured(NamedTuple):
    """K normed and unrotated, and V, of one layer and call: [B,T,Hkv,D]."""

    k: Array
    v: Array

    @classmethod
    def of(cls, trace: Mapping[str, Array]) -> Captured:
        """Those of a layer's trace."""
        return cls(trace.get("k_norm", trace["k_proj"]), trace["v_proj"])


class Turned(NamedTuple):
    """Queries [B,T,Hq,D] and keys [B,T,Hkv,D] of one layer and call, as heads compare them: normed and rotated."""

    q: Array
    k: Array

    @classmethod
    def of(cls, trace: Mapping[str, Array]) -> Turned:
        """Those of a layer's trace."""
        q, k = (trace.get(f"{name}_norm", trace[f"{name}_proj"]) for name in "qk")
        return cls(trace.get("q_rope", q), trace.get("k_rope", k))


class Forward(NamedTuple):
    """hidden [B,T,E], after the last norm; the cache with the call's tokens; of the layers asked for K and V, or Q and
    K as heads compare them.

    finite bool [L+1,B,T] says of which tokens the embedding and each layer's output is finite, if that was asked for.
    """

    hidden: Array
    cache: ModelCache
    captured: Mapping[int, Captured | Turned]
    finite: Array | None = None


class Decoder(nnx.Module):
    """A text model of any family, with its language head."""

    def __init__(self, spec: ModelSpec, sharding: ShardingConfig | None = None, *, rngs: nnx.Rngs) -> None:
        """Random parameters. Raises SpecError for a spec of no family, InputError for one that is not run here, and for
        an activation that the family's models do not have.
        """
        family = families.of(spec)
        if spec.hidden_activation not in family.activations:
            known = " or ".join(repr(name) for name in family.activations)
            raise InputError(f"hidden_activation is {spec.hidden_activation!r}; this model has {known} only")
        self.spec, self.sharding = spec, sharding or ShardingConfig.no_sharding()
        self.embed_tokens = Embedding(spec, spec_families.of(spec).embedding_scale(spec.hidden_size), rngs=rngs)
        pieces = family.activations[spec.hidden_activation], family.norm
        self.layers = nnx.List(
            [DecoderLayer(spec, index, self.sharding, *pieces, rngs=rngs) for index in range(spec.num_hidden_layers)]
        )
        self.norm = family.norm(spec.hidden_size, spec.rms_norm_eps)
        self.lm_head = None if spec.tie_word_embeddings else Linear(spec.hidden_size, spec.vocab_size, rngs=rngs)

    def __call__(
        self,
        ids: Array,
        mask: Array,
        cache: ModelCache,
        attached: Mapping[int, Attached | Injected],
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
            call, memory = Call(positions, mask, None, past, turn=turn, first=first), cache.blocks.get(index)
            trace: dict[str, Array] | None = {} if index in capture else None
            x, past, memory = layer(x, call, attached.get(index), memory, trace)
            caches.append(past)
            stages.append(x)
            if memory is not None:
                blocks[index] = memory
            if trace is not None:
                captured[index] = Turned.of(trace) if turned else Captured.of(trace)
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
