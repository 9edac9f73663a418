"""How many bytes keys and values take: an ordinary cache, Gemma-3's with its windows, and a static context."""

from __future__ import annotations

import math

from lyra.spec.arguments import check_choice
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Bytes of one element."""

LENGTHS = tuple(2**n for n in range(9, 18))
"""512 to 131,072 tokens."""


def calculate_kv_cache_size(
    num_layers: int, num_kv_heads: int, seq_len: int, head_dim: int, batch_size: int = 1, dtype: str = "float16"
) -> int:
    """Bytes of the keys and values of `seq_len` tokens in every layer: 2 · layers · heads · tokens · head_dim · rows.

    The formula in circulation is the same; the figures beside it (1,024 MiB for LLaMA-7B at 2,048 tokens) are those of
    two bytes an element, the default here. Raises InputError for a negative size or an unknown dtype.
    """
    sizes = {
        "num_layers": num_layers, "num_kv_heads": num_kv_heads, "seq_len": seq_len, "head_dim": head_dim,
        "batch_size": batch_size,
    }  # fmt: skip
    for name, value in sizes.items():
        if value < 0:
            raise InputError(f"{name} is {value}; expected 0 or more")
    return 2 * math.prod(sizes.values()) * DTYPES[check_choice("dtype", dtype, DTYPES)]


def full_cache_size(spec: ModelSpec, seq_len: int, batch_size: int = 1, dtype: str = "float16") -> int:
    """Bytes of a model's cache where every layer keeps all tokens, as a cache that knows no windows does."""
    heads, head_dim = spec.num_key_value_heads, spec.attention.head_dim
    return calculate_kv_cache_size(spec.num_hidden_layers, heads, seq_len, head_dim, batch_size, dtype)


def live_cache_size(spec: ModelSpec, seq_len: int, batch_size: int = 1, dtype: str = "float16") -> int:
    """Bytes of a model's cache after `seq_len` tokens: global layers keep all, sliding ones W - 1 of their window W.

    W - 1 because a query sees itself and W - 1 tokens before it, and a sliding cache keeps those only.
    """
    heads, head_dim = spec.num_key_value_heads, spec.attention.head_dim
    global_layers = len(spec.global_layers)
    window = spec.sliding.sliding_window if spec.sliding else None
    kept = seq_len if window is None else min(seq_len, window - 1)
    return sum(
        calculate_kv_cache_size(layers, heads, tokens, head_dim, batch_size, dtype)
        for layers, tokens in ((global_layers, seq_len), (spec.num_hidden_layers - global_layers, kept))
    )


def context_size(spec: ModelSpec, tokens: int, dtype: str = "float16") -> int:
    """Bytes of the keys and values of a static context: those of the Lyra heads' KV heads, global layers, one row.

    Every layer counts with its own split. One context serves every row of a batch (clause BATCH), so there is no batch
    to multiply by.
    """
    heads = sum(len(spec.layer(layer).lyra_kv_heads) for layer in spec.global_layers)
    return calculate_kv_cache_size(1, heads, tokens, spec.attention.head_dim, 1, dtype)


def stored_size(spec: ModelSpec, tokens: int, dtype: str = "float32") -> int:
    """Bytes that the keys and values of such a context occupy as it is stored, `StaticContext.nbytes`.

    Of int8 these are one byte each, four for the scale of each channel of the keys, once, and of each token of the
    values, and four a token and layer for the blocks of keys and of values (clause STORED-4).
    """
    codes = context_size(spec, tokens, dtype)
    if dtype != "int8":
        return codes
    heads = [len(spec.layer(layer).lyra_kv_heads) for layer in spec.global_layers]
    scales = sum(heads) * (spec.attention.head_dim + tokens)
    return codes + 4 * scales + 4 * 2 * tokens * sum(count > 0 for count in heads)
