"""A small random Gemma-3 with several layers, and Hugging Face's answers to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import transformers

from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.spec import ContextLayer, HeadSplit, StaticContext

VOCAB, WINDOW, LAYERS, GLOBAL = 97, 8, 4, (1, 3)
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention" if i in GLOBAL else "sliding_attention" for i in range(LAYERS)],
    "max_position_embeddings": 4096,
}
CUT = HeadSplit((1, 2, 3), share_kv=True)


def make_model(seed: int = 0, **changes: Any) -> Any:
    """A Gemma3ForCausalLM with random weights, norms included, and large enough to make peaked distributions."""
    torch.manual_seed(seed)
    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**(CONFIG | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim == 1 else 0.2)
    return model


def random_ids(batch: int, tokens: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, tokens))


def left_padding(batch: int, tokens: int) -> np.ndarray:
    mask = np.ones((batch, tokens), bool)
    for row in range(1, batch):
        mask[row, : 3 * row] = False
    return mask


def hf_logits(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    with torch.no_grad():
        given = None if mask is None else torch.tensor(mask.astype(np.int64))
        places = None if mask is None else torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
        return model(torch.tensor(ids), attention_mask=given, position_ids=places).logits.numpy()


def random_context(injector: GemmaInjector, kv_heads: Iterable[int], tokens: int = 6, seed: int = 3) -> StaticContext:
    """A context of random keys and values for the global layers of a tiny model."""
    random, kv_heads = np.random.default_rng(seed), tuple(kv_heads)
    shape = (2, 1, len(kv_heads), tokens, injector.spec.attention.head_dim)
    return StaticContext(
        layers={layer: ContextLayer(kv_heads, *random.normal(size=shape).astype(np.float32)) for layer in GLOBAL},
        mask=np.ones((1, tokens), bool),
        positions=np.arange(tokens)[None],
        fingerprint=injector.fingerprint(GLOBAL),
    )


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
