"""A small random Gemma-3 for the PyTorch engine, and what its tests do with it."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig

from lyra.spec import HeadSplit, StaticSpec
from lyra.spec.inputs import StaticLayer

WINDOW, VOCAB, GLOBAL = 8, 97, (2, 5)
CONTEXT = 20
SPLITS = {
    "half": HeadSplit((2, 3)),
    "cut": HeadSplit((0, 3), share_kv=True),
    "all": HeadSplit((0, 1, 2, 3)),
}


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention" if i in GLOBAL else "sliding_attention" for i in range(6)],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": None,
}


def save_random_model(config: Gemma3TextConfig, path) -> None:
    """A checkpoint with random weights, norm weights too: at zero they would hide a wrong order of stages."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(path)


def some_ids(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, tokens))


def context_for(engine, splits: dict[int, HeadSplit], seed: int = 7, tokens: int = CONTEXT) -> dict[int, StaticLayer]:
    captured = engine.capture(some_ids(1, tokens, seed), list(splits))
    positions = np.arange(tokens)[None]
    return {
        layer: StaticLayer(
            captured[layer].k[:, list(split.bind(engine.spec).lyra_kv_heads)],
            captured[layer].v[:, list(split.bind(engine.spec).lyra_kv_heads)],
            np.ones((1, tokens), dtype=bool),
            positions,
        )
        for layer, split in splits.items()
    }


def attach(engine, split: HeadSplit, live: str = "causal", positions: str = "continue") -> None:
    splits = dict.fromkeys(GLOBAL, split)
    engine.attach(context_for(engine, splits), splits, StaticSpec(live, positions))


def left_padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    width = max(len(row) for row in rows)
    ids = np.stack([np.concatenate((np.zeros(width - len(row), dtype=int), row)) for row in rows])
    mask = np.stack([np.arange(width) >= width - len(row) for row in rows])
    return ids, mask


def greedy_by_prefill(engine, ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The greedy continuation, computed from scratch at each step: tokens [B,count] and the last logits."""
    start = ids.shape[1]
    for _ in range(count):
        logits = engine.logits(ids)[:, -1]
        ids = np.concatenate((ids, logits.argmax(-1)[:, None]), axis=1)
    return ids[:, start:], logits


def token_by_token(engine, ids: np.ndarray) -> np.ndarray:
    """Logits [B,T,V] of a run that feeds one token a call."""
    cache = DynamicCache(config=engine.module.config)
    with torch.inference_mode():
        steps = [
            engine.module(input_ids=torch.tensor(ids[:, t : t + 1]), past_key_values=cache, use_cache=True).logits
            for t in range(ids.shape[1])
        ]
    return torch.cat(steps, dim=1).numpy()
