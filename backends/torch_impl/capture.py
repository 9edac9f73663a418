"""Capturing keys and values for a static context (clause CAPTURE)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from lyra.backends.protocol import CapturedLayer
from lyra.spec.finite import first_token

from .families import of_text
from .finite import locate


def capture(
    module: PreTrainedModel,
    ids: torch.Tensor,
    layers: Sequence[int],
    chunk_size: int,
    on_chunk: Callable[[int], None] | None = None,
) -> dict[int, CapturedLayer]:
    """Run the unmodified model over ids [1,S] in chunks; k (normed, unrotated) and v of `layers`, [1,Hkv,S,D].

    The model's own cache carries the sliding-window layers from chunk to chunk; what is kept is read off the submodules
    that make it, because that cache holds rotated keys and forgets what has left the window. Clauses CAPTURE-1,
    CAPTURE-2.

    Raises NotFiniteError for keys or values that are NaN or infinite.
    """
    found: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {layer: ([], []) for layer in layers}
    cache = DynamicCache(config=module.config)
    with _watch(module, found), _evaluating(module):
        for start in range(0, ids.shape[1], chunk_size):
            chunk = ids[:, start : start + chunk_size]
            module(input_ids=chunk, past_key_values=cache, use_cache=True)
            if on_chunk is not None:
                on_chunk(start + chunk.shape[1])
    captured = {
        layer: CapturedLayer(*(torch.cat(part, dim=2).float().cpu().numpy() for part in parts))
        for layer, parts in found.items()
    }
    for layer, pair in sorted(captured.items()):
        for name, values in zip(("keys", "values"), pair, strict=True):
            if not np.isfinite(values).all():
                place = f"the {name} of layer {layer} at token {first_token(values)}"
                raise locate(module, ids, otherwise=place)
    return captured


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode: in training dropout draws, and checkpointed layers forget the chunks before."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _watch(module: PreTrainedModel, found: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]]) -> Iterator[None]:
    """Collect keys, normed and unrotated, and values of layers, [1,Hkv,T,D] each, while the code within runs."""
    known = of_text(module)
    handles = []
    try:
        for layer, parts in found.items():
            for source, kept in zip(known.keys_and_values(module.layers[layer].self_attn), parts, strict=True):
                handles.append(
                    source.module.register_forward_hook(
                        lambda _m, _i, out, by_head=source.by_head, kept=kept: kept.append(by_head(out))
                    )
                )
        yield
    finally:
        for handle in handles:
            handle.remove()
