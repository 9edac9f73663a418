"""External caches, the contexts that injected blocks read: from token ids, or from a whole transformers Cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM
from transformers.cache_utils import Cache

from lyra.spec.errors import InputError
from lyra.spec.inputs import StaticLayer
from lyra.spec.model import ModelSpec

from .capture import capture
from .tokens import check_tokens, token_positions


def external_from_ids(
    module: Gemma3ForCausalLM,
    ids: np.ndarray,
    layers: Iterable[int] | None = None,
    *,
    chunk_size: int = 512,
    on_chunk: Callable[[int], None] | None = None,
) -> dict[int, StaticLayer]:
    """The external cache of a text, ids [1,S]: every KV head of `layers`, by default the global ones. Clause CAPTURE.

    Raises InputError for ids that are no such thing.
    """
    spec = _spec(module)
    tokens = check_tokens(ids, None, spec.vocab_size, module.device)
    if len(tokens.ids) != 1 or chunk_size < 1:
        raise InputError(f"ids has {len(tokens.ids)} rows and chunk_size is {chunk_size}; expected 1 row, 1 or more")
    with torch.inference_mode():
        found = capture(module, tokens.ids, _layers(spec, layers), chunk_size, on_chunk)
    slots = tokens.ids.shape[1]
    mask, positions = np.ones((1, slots), dtype=bool), np.arange(slots)[None]
    return {layer: StaticLayer(one.k, one.v, mask, positions) for layer, one in found.items()}


def external_from_cache(
    module: Gemma3ForCausalLM, cache: Cache, layers: Iterable[int] | None = None, *, mask: np.ndarray | None = None
) -> dict[int, StaticLayer]:
    """What a transformers Cache of `module` holds, as an external cache: `layers` are by default the global ones.

    mask [B,S] bool is that of the tokens in the cache, False at padding. The keys, which a cache holds rotated, are
    turned back with the cosines and sines that the model itself turned them with (clause STORED-1). Raises InputError
    for a cache that is not whole: a sliding layer keeps only what its window still needs, and what it dropped is lost.
    """
    spec = _spec(module)
    return {layer: _from_layer(module, spec, cache, layer, mask) for layer in _layers(spec, layers)}


def _from_layer(
    module: Gemma3ForCausalLM, spec: ModelSpec, cache: Cache, number: int, mask: np.ndarray | None
) -> StaticLayer:
    k, v = _whole(cache, number)
    expected = (spec.num_key_value_heads, spec.attention.head_dim)
    if (k.shape[1], k.shape[3]) != expected:
        raise InputError(
            f"layer {number} of the cache holds {k.shape[1]} KV heads of {k.shape[3]}; the model has {expected[0]} of "
            f"{expected[1]}: give a cache of this model"
        )
    shape = (k.shape[0], k.shape[2])
    mask = np.ones(shape, dtype=bool) if mask is None else np.asarray(mask)
    if mask.shape != shape or mask.dtype != np.bool_:
        raise InputError(f"mask has shape {mask.shape} and dtype {mask.dtype}; the cache holds bool {shape}")
    positions = token_positions(torch.tensor(mask, dtype=torch.long, device=k.device))
    kind = module.config.layer_types[number]
    with torch.inference_mode():
        cos, sin = module.model.rotary_emb(k[:, 0], positions, kind)
    seen = torch.tensor(mask, device=k.device)[:, None, :, None]  # padding may hold anything: its slots become 0
    arrays = [torch.where(seen, part, 0.0).float().cpu().numpy() for part in (turned_back(k, cos, sin), v)]
    return StaticLayer(*arrays, mask, positions.cpu().numpy())


def _whole(cache: Cache, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (rotated) and values [B,Hkv,S,D] of one layer of a cache. Raises InputError where it has not all tokens."""
    layer: Any = cache.layers[number] if number < len(cache.layers) else None
    seen = 0 if layer is None else int(layer.get_seq_length())
    if seen == 0 or layer.keys is None:
        raise InputError(f"layer {number} of the cache is empty; run the model over the context's tokens with it first")
    held = layer.keys.shape[2]
    if held < seen:
        raise InputError(
            f"layer {number} of the cache has seen {seen} tokens and keeps the last {held}: it is a sliding-window "
            f"layer and has dropped the others; take global layers, or capture the text in their place"
        )
    return layer.keys[:, :, :seen], layer.values[:, :, :seen]


def turned_back(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys before RoPE, from rotated ones: k [B,H,S,D]; cos, sin [B,S,D] as Hugging Face gives them. Clause ROPE-1.

    In float64, and divided by cos² + sin², which rounding has moved away from 1.
    """
    first, second = k.double().chunk(2, dim=-1)
    c, s = (table[:, None, :, : k.shape[-1] // 2].double() for table in (cos, sin))
    straight = torch.cat((first * c + second * s, second * c - first * s), dim=-1)
    return (straight / (c.square() + s.square()).repeat(1, 1, 1, 2)).to(k.dtype)


def _spec(module: Gemma3ForCausalLM) -> ModelSpec:
    return ModelSpec.from_hf_config(module.config.to_dict())


def _layers(spec: ModelSpec, layers: Iterable[int] | None) -> list[int]:
    chosen = sorted(set(spec.global_layers if layers is None else layers))
    outside = [layer for layer in chosen if not 0 <= layer < spec.num_hidden_layers]
    if outside:
        raise InputError(f"there are no layers {outside}; the model has {spec.num_hidden_layers}")
    return chosen
