"""Generation: a prefill, then one step a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from lyra.backends.protocol import Sampling

from .finite import finite_rows, locate
from .sampling import draw, most_likely
from .tokens import token_positions


def generate(
    module: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    on_token: Callable[[np.ndarray], None] | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> np.ndarray:
    """The continuation of ids [B,T], int [B,N]: at each step the most likely token, or one drawn by `sampling`.

    Padding, if any, is on the left. Stops when every row has produced a token of `stop_ids`; rows that stopped earlier
    repeat theirs. Raises NotFiniteError for scores that are NaN or infinite.
    """
    cache = DynamicCache(config=module.config)
    generator = torch.Generator(ids.device).manual_seed(seed)
    stops = torch.tensor(list(stop_ids), dtype=torch.long, device=ids.device)
    positions = None if mask is None else token_positions(mask)
    stopped = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    made: list[torch.Tensor] = []
    feed = ids
    while len(made) < max_new_tokens:
        logits = module(
            input_ids=feed,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if not bool((finite_rows(logits) | stopped).all()):
            raise locate(module.model, torch.cat((ids, *(column[:, None] for column in made)), dim=1), mask)
        token = most_likely(logits) if sampling is None else draw(logits, sampling, generator)
        token = torch.where(stopped, made[-1], token) if made else token
        made.append(token)
        if on_token is not None:
            on_token(token.numpy(force=True).copy())
        stopped = stopped | torch.isin(token, stops)
        if stopped.all():
            break
        feed = token[:, None]
        if mask is not None and positions is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
            positions = positions[:, -1:] + 1
    return torch.stack(made, dim=1).cpu().numpy() if made else np.zeros((len(ids), 0), dtype=np.int64)
