"""What a whole transformers Cache holds, as the keys and values of a static context: keys turned back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from lyra.backends.protocol import CapturedLayer
from lyra.spec.arguments import check_kind
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec

from .families import of_text
from .tokens import token_positions


def from_cache(
    text: PreTrainedModel, spec: ModelSpec, cache: Cache, layers: Sequence[int], mask: np.ndarray | None
) -> tuple[dict[int, CapturedLayer], np.ndarray, np.ndarray]:
    """Keys and values [B,Hkv,S,D] of some layers of a cache that `text` has filled, mask bool and positions [B,S].

    `mask` None means no padding. Keys are turned back with the cosines and sines that the model itself turned them
    with (clause STORED-1); slots of padding become 0. Raises InputError for a cache of another model, and for one that
    is not whole: a sliding-window layer keeps only what its window still needs, and what it dropped is lost.
    """
    check_kind("cache", cache, Cache)
    whole = {layer: _whole(spec, cache, layer) for layer in layers}
    shape = next(iter(whole.values()))[0][:, 0, :, 0].shape
    mask = np.ones(shape, dtype=bool) if mask is None else np.asarray(mask)
    if mask.shape != tuple(shape) or mask.dtype != np.bool_:
        raise InputError(f"mask has shape {mask.shape} and dtype {mask.dtype}; the cache holds bool {tuple(shape)}")
    seen = torch.tensor(mask, device=text.device)
    positions = token_positions(seen.long())
    known, found = of_text(text), {}
    with torch.inference_mode():
        for layer, (k, v) in whole.items():
            cos, sin = known.turn(text, k, positions, layer)
            found[layer] = CapturedLayer(*(_array(part, seen) for part in (turned_back(k, cos, sin), v)))
    return found, mask, positions.cpu().numpy()


def turned_back(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Keys before RoPE, from rotated ones: k [B,H,S,D]; cos, sin [B,S,D] as Hugging Face gives them. Clause ROPE-1.

    With the tables that turned them an angle's own error, which grows with the position, cancels.
    """
    first, second = k.double().chunk(2, dim=-1)
    c, s = (table[:, None, :, : k.shape[-1] // 2].double() for table in (cos, sin))
    return torch.cat((first * c + second * s, second * c - first * s), dim=-1).to(k.dtype)


def _whole(spec: ModelSpec, cache: Cache, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (rotated) and values [B,Hkv,S,D] of one layer of a cache. Raises InputError where some are missing."""
    layer: Any = cache.layers[number] if number < len(cache.layers) else None
    seen = 0 if layer is None else int(layer.get_seq_length())
    if seen == 0:
        raise InputError(f"layer {number} of the cache is empty; run the model over the context's tokens with it first")
    heads, held, head_dim = layer.keys.shape[1:]
    if held < seen:
        raise InputError(
            f"layer {number} of the cache has seen {seen} tokens and keeps the last {held}: it is a sliding-window "
            f"cache layer and has dropped the others; take a cache that keeps them, or capture the text"
        )
    if (heads, head_dim) != (spec.num_key_value_heads, spec.attention.head_dim):
        raise InputError(
            f"layer {number} of the cache holds {heads} KV heads of {head_dim}; the model has "
            f"{spec.num_key_value_heads} of {spec.attention.head_dim}: give a cache of this model"
        )
    return layer.keys[:, :, :seen], layer.values[:, :, :seen]


def _array(values: torch.Tensor, seen: torch.Tensor) -> np.ndarray:
    """values [B,Hkv,S,D] as float32, 0 where seen [B,S] is False: padding may hold anything."""
    return torch.where(seen[:, None, :, None], values, 0.0).float().cpu().numpy()
