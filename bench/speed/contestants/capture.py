"""Capturing a context from the real 270M beside Hugging Face's prefill of the same tokens."""

from __future__ import annotations

from pydoc_data.topics import topics

import numpy as np

import lyra
from lyra.checkpoint import resolve
from lyra.text import Text

from ..row import Work


def capture(backend: str, tokens: int, chunk: int) -> Work:
    """Model.capture, from token ids to a StaticContext."""
    model = lyra.load("gemma-3-270m", backend=backend)
    ids = text_ids(tokens)
    return Work(lambda: model.capture(ids, chunk_size=chunk))


def hugging_face(tokens: int, chunk: int | None = None) -> Work:
    """The same tokens into Hugging Face's own cache, at once or in chunks, without logits."""
    import torch
    from transformers import DynamicCache

    from .model_torch import weights  # here, because it imports torch

    decoder = weights().model
    ids = torch.from_numpy(text_ids(tokens))[None]

    @torch.inference_mode()
    def run() -> None:
        cache = DynamicCache(config=decoder.config)
        for part in ids.split(chunk or tokens, dim=1):
            decoder(input_ids=part, past_key_values=cache, use_cache=True)

    return Work(run)


def text_ids(tokens: int) -> np.ndarray:
    """The first tokens of the longest English text in the standard library, BOS in front."""
    text = Text.from_folder(resolve("gemma-3-270m"))
    assert text is not None
    return np.array(text.encode("\n".join(topics.values())[: 8 * tokens])[:tokens])
