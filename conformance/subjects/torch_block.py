"""Injected blocks of `torch-module`: a MemoryInjectionBlock in a decoder layer of a real model (clause SEQUENTIAL)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lyra.backends.protocol import Result, Unsupported
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import CallInputs, StaticLayer, check_call, check_weights
from lyra.spec.sequential import SequentialSpec

from .torch_host import Host, Variant, install, tensors
from .torch_layer import ModuleAttention, ModuleCache, feed_of, followed, leave, past_of


class ModuleBlock(ModuleAttention):
    """A block in a decoder layer, as an `Attention` whose x is h.

    A lent block computes with the submodules of its layer, another one with parameters of its own, which are loaded
    into it. With source "own" the layer is that of the cache: its attention runs over what it was given, and the block
    behind it, in the one call that a decoder layer makes of both.
    """

    def __init__(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray]) -> None:
        self.block = spec
        self.spec = spec.attention
        self.weights = {name: array.copy() for name, array in check_weights(spec, weights).items()}
        self.lent = Variant.of(weights).lent
        if spec.source == "external":
            self.host = self._host(self.spec, Variant.of(weights), self.weights if self.lent else None)

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
        if self.block.source == "own":
            return self._behind_its_layer(inputs, static, cache, trace)
        after = followed(self, past_of(cache, inputs), inputs)
        self._inject(self.host, inputs.static)
        return self._run(self.host, inputs, inputs, after, after, trace)

    def _behind_its_layer(
        self, inputs: CallInputs, static: StaticLayer | None, cache: object | None, trace: bool
    ) -> Result:
        """The layer's own call once more, with the block behind its attention; the cache that was given comes back."""
        if not isinstance(cache, ModuleCache) or cache.fed is None or cache.owner is None:
            raise Unsupported(
                "a decoder layer gives its block the cache that its attention has just used, and no other"
            )
        fed = cache.fed
        if not np.array_equal(fed.mask, inputs.mask) or not np.array_equal(fed.positions, inputs.positions):
            raise Unsupported("a decoder layer gives its block the tokens of its own call, and no others")
        own = cache.owner
        keys = {name: array for name, array in own.weights.items() if name.startswith(("k_", "v_"))}
        host = self._host(own.spec, Variant.of(own.weights), self.weights | keys if self.lent else own.weights)
        self._inject(host, static)  # which refuses a context
        after = followed(own, cache.before, fed)
        return self._run(host, fed, inputs, after, cache, trace)

    def _run(
        self, host: Host, fed: CallInputs, inputs: CallInputs, after: ModuleCache, returned: ModuleCache, trace: bool
    ) -> Result:
        feed = feed_of(fed, after)._replace(h=torch.tensor(inputs.x))
        with torch.inference_mode():
            seen = host.run(feed, after.hf, trace=trace)
        stages = {**seen.stages, "output": seen.output}
        names = self.block.trace_names() if trace else ()
        return Result(leave(seen.output), returned, {name: leave(stages[name]) for name in names})

    def _host(self, spec: AttentionSpec, variant: Variant, weights: Mapping[str, np.ndarray] | None) -> Host:
        """A model whose layer has these weights, those of a block's norms in its own norms; others if there are none.

        The layer beside it is of the same kind where its block has live keys of its own, which a window could not keep.
        """
        host = Host(spec, variant, other="same" if self.block.source == "external" else "kind")
        for decoder_layer in host.model.model.layers:  # a config has one eps for all norms
            decoder_layer.input_layernorm.eps = decoder_layer.post_attention_layernorm.eps = self.block.norm_eps
        if weights is None:
            return host
        install(host, spec, {name: weights[name] for name in spec.weight_shapes()})
        norms = {"input_norm": host.layer.input_layernorm, "output_norm": host.layer.post_attention_layernorm}
        for name, norm in norms.items():
            if (weight := weights.get(f"{name}.weight")) is not None:
                norm.load_state_dict({"weight": torch.tensor(weight)})
        return host

    def _inject(self, host: Host, static: StaticLayer | None) -> None:
        """Put the block behind the layer's attention, another one behind the other layer's. Raises InputError."""
        beside = 1 - host.place
        static_of = {} if static is None else {host.place: static}
        blocks = {host.place: self.block, beside: self.block.replace(gate=0.5)}
        host.injector.place_blocks(static_of, blocks, trainable=not self.lent)
        if not self.lent:
            state = tensors(self.weights) | {"gate": torch.tensor(self.block.gate, dtype=torch.float32)}
            host.layer.injected.load_state_dict(state)
