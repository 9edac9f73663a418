"""Capturing keys and values for a static context (clause CAPTURE)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, Gemma3TextModel

from lyra.backends.protocol import CapturedLayer
from lyra.spec.finite import first_token

from .finite import locate


def capture(
    module: Gemma3TextModel,
    ids: torch.Tensor,
    layers: Sequence[int],
    chunk_size: int,
    on_chunk: Callable[[int], None] | None = None,
) -> dict[int, CapturedLayer]:
    """Run the unmodified model over ids [1,S] in chunks; k (normed, unrotated) and v of `layers`, [1,Hkv,S,D].

    The model's own cache carries the sliding-window layers from chunk to chunk; what is kept is read off k_norm and
    v_proj, because that cache holds rotated keys and forgets what has left the window. Clauses CAPTURE-1, CAPTURE-2.

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
def _watch(module: Gemma3TextModel, found: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]]) -> Iterator[None]:
    """Collect the outputs of k_norm [1,Hkv,T,D] and v_proj [1,T,Hkv·D] while the block runs."""
    handles = []
    try:
        for layer, (keys, values) in found.items():
            attention = module.layers[layer].self_attn
            handles.append(attention.k_norm.register_forward_hook(lambda _m, _i, out, keys=keys: keys.append(out)))
            handles.append(
                attention.v_proj.register_forward_hook(
                    lambda _m, _i, out, values=values, D=attention.head_dim: values.append(
                        out.unflatten(-1, (-1, D)).transpose(1, 2)
                    )
                )
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
