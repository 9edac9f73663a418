"""Looking for the first layer and token whose numbers are not finite, once a result was not."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from lyra.spec.errors import NotFiniteError
from lyra.spec.finite import not_finite

from .tokens import token_positions

CHUNK = 512
"""Tokens that are fed at once."""


def finite_rows(values: torch.Tensor) -> torch.Tensor:
    """Which rows of values [...,V] hold no NaN and no infinity: bool [...]."""
    sums = torch.isfinite(values.sum(dim=-1, dtype=torch.float32))  # a finite sum has finite terms only
    return sums if bool(sums.all()) else torch.isfinite(values).all(dim=-1)


def locate(
    module: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    otherwise: str = "the scores",
) -> NotFiniteError:
    """The error of a call that met NaN or infinity for ids [B,T], mask [B,T]: the layer and token that it begins at.

    Runs the model again, as it is now, with what is attached to it.
    """
    seen = np.ones(ids.shape, dtype=bool) if mask is None else mask.bool().cpu().numpy()
    dtype = str(module.norm.weight.dtype).removeprefix("torch.")
    return not_finite(dtype, finite_layers(module, ids, mask), seen, otherwise)


@torch.inference_mode()
def finite_layers(module: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
    """Of which tokens the embedding and the output of each layer is finite: bool [L+1,B,T]."""
    watched = [module.embed_tokens, *module.layers]
    found: list[list[torch.Tensor]] = [[] for _ in watched]
    handles = [
        part.register_forward_hook(lambda _m, _i, out, flags=flags: flags.append(torch.isfinite(out).all(dim=-1)))
        for part, flags in zip(watched, found, strict=True)
    ]
    positions = None if mask is None else token_positions(mask)
    cache = DynamicCache(config=module.config)
    try:
        for start in range(0, ids.shape[1], CHUNK):
            some = slice(start, start + CHUNK)
            module(
                input_ids=ids[:, some],
                attention_mask=None if mask is None else mask[:, : start + CHUNK],
                position_ids=None if positions is None else positions[:, some],
                past_key_values=cache,
                use_cache=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    return np.stack([torch.cat(flags, dim=1).cpu().numpy() for flags in found])
