"""The half of the injector that puts attention blocks behind the layers' own attention (clause SEQUENTIAL)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Self

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lyra.spec import families
from lyra.spec.arguments import check_flag, check_indices, check_path
from lyra.spec.attaching import (
    Gate,
    SplitSource,
    block_contexts,
    blocks_by_layer,
    check_gates_of,
    check_origin,
    gates_by_layer,
)
from lyra.spec.attention import Live, Positions, StaticSpec
from lyra.spec.context import StaticContext
from lyra.spec.errors import InputError
from lyra.spec.fingerprint import Fingerprint
from lyra.spec.inputs import StaticLayer
from lyra.spec.model import ModelSpec
from lyra.spec.sequential import SequentialSpec

from .injected import MemoryInjectionBlock, check_place, inject, withdraw
from .live_rope import check_rope
from .tensor_parallel import share_of

CONTEXTS = "a StaticContext, the path of its file, or a transformers Cache"


class BlockInjector(ABC):
    """Gives layers of a model injected blocks and takes them away again; `Injector` is one, for any model."""

    text: PreTrainedModel

    @property
    @abstractmethod
    def spec(self) -> ModelSpec:
        """What the model does."""

    @abstractmethod
    def fingerprint(self, layers: Iterable[int]) -> Fingerprint:
        """What a context of some global layers of this model carries."""

    @abstractmethod
    def context_of(
        self, cache: Cache, *, layers: Iterable[int] | None = None, mask: np.ndarray | None = None
    ) -> StaticContext:
        """The context that a transformers Cache holds."""

    @property
    def injected(self) -> dict[int, MemoryInjectionBlock]:
        """The layers that have an injected block now."""
        found = ((number, getattr(layer, "injected", None)) for number, layer in enumerate(self.text.layers))
        return {number: block for number, block in found if isinstance(block, MemoryInjectionBlock)}

    def inject(
        self,
        external_kv_cache: StaticContext | str | os.PathLike[str] | Cache | None = None,
        *,
        gate: Gate = 0.0,
        residual: bool = True,
        layers: Iterable[int] | None = None,
        split: SplitSource | None = None,
        live: Live = "none",
        positions: Positions = "continue",
        trainable: bool = False,
        override: bool = False,
    ) -> Self:
        """Put a block behind the self-attention of layers; what was injected before is replaced. Clause SEQUENTIAL.

        `external_kv_cache` is what the blocks read: a StaticContext or its file, or a transformers Cache of this model
        without padding (else make a context of it with `context_of`). With None they read the model's own cache, in
        any layers; by default `layers` are those of the context, or the global ones. `gate` is one number or one for
        each layer; at 0, the start, the model is Hugging Face's bit for bit. `split` names the heads of a block that
        read the context, by default all that find their KV head in it; `live` is what they see of live tokens, whose
        keys and values are then the block's own. `trainable` copies the layer's weights into parameters of the
        block, the gate being another one.

        Raises ContextError for a context of another model, unless `override`, and for one without the layers or heads
        asked for; SpecError for a split or gates that do not fit; InputError for a cache that is not whole. A refusal
        changes nothing.
        """
        check_flag("override", override)
        check_flag("trainable", trainable)
        check_flag("residual", residual)
        if external_kv_cache is None:
            asked = self.spec.global_layers if layers is None else check_indices("layers", layers)
            chosen = sorted(set(asked))
            gates, norms = gates_by_layer(gate, chosen), families.of(self.spec).block_fields(self.spec)
            blocks = {
                layer: SequentialSpec.for_layer(
                    self.spec.layer(layer), source="own", residual=residual, gate=gates[layer], **norms
                )
                for layer in chosen
            }
            self.place_blocks({}, blocks, trainable=trainable)
            return self
        context = external_kv_cache
        if isinstance(context, Cache):
            context = self.context_of(context, layers=layers)
        elif not isinstance(context, StaticContext):
            context = StaticContext.load(check_path("external_kv_cache", context, CONTEXTS))
        if not override:
            check_origin(context, self.fingerprint(set(context.layers) & set(self.spec.global_layers)))
        if layers is not None:
            asked = check_indices("layers", layers)
            context = context.take({layer: context.kv_heads.get(layer, ()) for layer in asked})
        blocks = blocks_by_layer(
            self.spec, context.kv_heads, split, StaticSpec(live=live, positions=positions), gate, residual
        )
        self.place_blocks(block_contexts(context, blocks), blocks, trainable=trainable)
        return self

    def withdraw(self) -> None:
        """Take the blocks out again: the layers are Hugging Face's own, bit for bit."""
        for number in self.injected:
            withdraw(self.text.layers[number])

    attached, attach, detach = injected, inject, withdraw
    """Other names of the same three, as code written for blocks that are "attached" knows them."""

    def place_blocks(
        self, static: Mapping[int, StaticLayer], blocks: Mapping[int, SequentialSpec], *, trainable: bool = False
    ) -> None:
        """`inject` with the spec of each layer's block and the context of each; keys are rotated here, once.

        Raises InputError; then nothing has changed.
        """
        outside = sorted(set(blocks) - set(range(self.spec.num_hidden_layers))) or sorted(set(static) - set(blocks))
        if outside:
            raise InputError(f"inject: layers {outside} have no place for a block or no block for their context")
        self._check_in_one_piece("inject: a block", blocks)
        if static:
            check_rope(self.text, self.spec)
        made = {
            layer: MemoryInjectionBlock(
                self.text.layers[layer],
                block,
                static.get(layer),
                trainable=trainable,
                slot=self.spec.num_hidden_layers + rank,
            )
            for rank, (layer, block) in enumerate(sorted(blocks.items()))
        }
        for layer in made:
            check_place(self.text.layers[layer])
        self.withdraw()
        for layer, block in made.items():
            inject(self.text.layers[layer], block)

    def set_gates(self, gates: Mapping[int, float]) -> None:
        """Change the gates of blocks, by layer; 0 closes one. Raises InputError for a layer without a block."""
        blocks = self.injected
        with torch.no_grad():
            for layer, gate in check_gates_of(gates, blocks).items():
                blocks[layer].gate.fill_(gate)

    def _check_in_one_piece(self, what: str, layers: Iterable[int]) -> None:
        if any(share_of(self.text.layers[layer].self_attn).ranks > 1 for layer in layers):
            raise InputError(
                f"{what} needs all heads, and the model's are spread over processes (tensor parallel); "
                f"load the model in one piece for it"
            )
