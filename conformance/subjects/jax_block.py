"""Injected blocks of `jax-module`: a block in a layer of the decoder, with that layer's weights (clause SEQUENTIAL)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lyra.backends.protocol import Result, Unsupported
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import CallInputs, StaticLayer, check_call, check_weights
from lyra.spec.sequential import SequentialSpec

from .jax_host import BESIDE, PLACE, Host
from .jax_layer import ModuleAttention, ModuleCache, answer, begun, columns, followed, of_layer, packed_for, past_of

NORMS = {"input_norm.weight": "input_layernorm.weight", "output_norm.weight": "post_attention_layernorm.weight"}
"""Where a decoder layer keeps the norms of its block."""


class ModuleBlock(ModuleAttention):
    """A block in a decoder layer, as an `Attention` whose x is h.

    A model's block computes with its layer's weights, so the layer has the block's. With source "own" it is the layer
    of the cache: it has the keys and values of its own attention and the rest of the block, and its attention runs over
    what it was given, the block behind it, in the one call that a decoder layer makes of both.
    """

    def __init__(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray]) -> None:
        self.block = spec
        self.spec = spec.attention
        self.dtype = "float32"
        self.weights = {name: array.copy() for name, array in check_weights(spec, weights).items()}
        if spec.source == "external":
            self.host = self._host(self.spec, self.weights)

    def __call__(
        self,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
        cache: object | None = None,
        trace: bool = False,
    ) -> Result:
        """Run the model over h in the block's place. Shapes as in the protocol. Raises InputError, Unsupported."""
        inputs = check_call(self.spec, x, positions, mask, static)
        names = self.block.trace_names() if trace else ()
        owner: ModuleAttention = self
        if self.block.source == "external":
            past, host, fed = past_of(cache, inputs), self.host, inputs
        else:
            past, host, fed, owner = self._layer_of(cache)
            if not np.array_equal(fed.mask, inputs.mask) or not np.array_equal(fed.positions, inputs.positions):
                raise Unsupported("a decoder layer gives its block the tokens of its own call, and no others")
        self._inject(host, static if self.block.source == "own" else inputs.static)
        packed = packed_for(self.spec, past, inputs)
        held = begun(host, past, inputs)
        made = host.run(columns(fed.x, packed), columns(inputs.x, packed), packed.mask, held, past is None)
        after = followed(owner, made[1], past, inputs)
        given = after if self.block.source == "external" else cache  # one that is shared comes back as it is
        return answer(made, given, packed, names)

    def _layer_of(self, cache: object | None) -> tuple[ModuleCache | None, Host, CallInputs, ModuleAttention]:
        """The cache before the last call of the layer that filled this one, a host with its keys, what it was fed."""
        if not isinstance(cache, ModuleCache) or cache.fed is None or cache.owner is None:
            raise Unsupported(
                "a decoder layer gives its block the cache that its attention has just used, and no other"
            )
        owner = cache.owner
        keys = {name: array for name, array in owner.weights.items() if name.startswith(("k_", "v_"))}
        return cache.before, self._host(owner.spec, self.weights | keys), cache.fed, owner

    def _host(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> Host:
        norms = {theirs: weights[ours] for ours, theirs in NORMS.items() if ours in weights}
        attention = {name: weights[name] for name in spec.weight_shapes()}
        if self.block.source == "external" and spec.rope is not None:  # a block may have another RoPE than its layer
            spec = spec.replace(rope=spec.rope.replace(theta=spec.rope.theta * 3))
        return Host(spec, of_layer(attention) | norms, "float32", alike=self.block.source == "external")

    def _inject(self, host: Host, static: StaticLayer | None) -> None:
        """Put the block behind the layer's attention, another one behind the other layer's. Raises InputError."""
        blocks = {PLACE: self.block}
        if self.block.source == "external":
            blocks[BESIDE] = self.block.replace(gate=0.5)
        host.engine.inject({} if static is None else {PLACE: static}, blocks)
