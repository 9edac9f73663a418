"""Blocks in a small random Gemma-3, for tests of the sequential mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch_gemma import GLOBAL, context_for

from lyra.backends.torch_impl.injected import MemoryInjectionBlock, inject, withdraw
from lyra.spec import HeadSplit, SequentialSpec, StaticSpec
from lyra.spec.inputs import StaticLayer

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"live": "causal", "output_norm": False},
    "self": {"live": "self", "positions": "overlay"},
    "cut": {"split": HeadSplit((0, 3), share_kv=True), "gate": -0.5},
    "replacement": {"residual": False},
    "own": {"source": "own"},
}
"""Kinds of blocks: what they see of live tokens, which of their heads read the context, how they join."""


def block_spec(
    engine, layer: int, live: str = "none", positions: str = "continue", split: HeadSplit | None = None, **fields: Any
) -> SequentialSpec:
    """The spec of a block in a layer; `fields` are those of SequentialSpec, the gate being 1 by default."""
    fields = {"gate": 1.0} | fields
    if fields.get("source") == "own":
        return SequentialSpec.for_layer(engine.spec.layer(layer), **fields)
    attention = engine.spec.layer(layer).replace(
        split=split or HeadSplit.all(engine.spec), static=StaticSpec(live, positions)
    )
    return SequentialSpec(attention=attention, norm_eps=engine.spec.rms_norm_eps, **fields)


def context_of(engine, spec: SequentialSpec, layer: int) -> StaticLayer | None:
    """A context for a block, with a masked slot full of poison."""
    if spec.source == "own":
        return None
    static = context_for(engine, {layer: spec.attention.split})[layer]
    static.mask[0, 3] = False
    static.k[:, :, 3] = static.v[:, :, 3] = 1e9
    return static


@contextmanager
def blocks_in(engine, layers=GLOBAL, trainable: bool = False, **fields: Any) -> Iterator[dict[int, Any]]:
    """The engine's model with a block in each of `layers`; gives the blocks by layer."""
    specs = {layer: block_spec(engine, layer, **fields) for layer in layers}
    contexts = {layer: context_of(engine, spec, layer) for layer, spec in specs.items()}
    found = {}
    for rank, (layer, spec) in enumerate(specs.items()):
        decoder = engine.module.model.layers[layer]
        slot = engine.spec.num_hidden_layers + rank
        found[layer] = MemoryInjectionBlock(decoder, spec, contexts[layer], trainable=trainable, slot=slot)
    for layer, block in found.items():
        inject(engine.module.model.layers[layer], block)
    try:
        yield found
    finally:
        for layer in found:
            withdraw(engine.module.model.layers[layer])


def seen_by(module: torch.nn.Module, run) -> tuple[np.ndarray, np.ndarray]:
    """What goes into a module and what comes out while `run()` runs, first arguments, as NumPy."""
    found: dict[str, Any] = {}

    def look(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
        first = args[0] if args else kwargs["hidden_states"]
        found.update(x=first, y=output[0] if isinstance(output, tuple) else output)

    hook = module.register_forward_hook(look, with_kwargs=True)
    try:
        run()
    finally:
        hook.remove()
    return found["x"].numpy(), found["y"].numpy()
