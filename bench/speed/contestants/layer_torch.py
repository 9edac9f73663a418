"""One global layer of Gemma-3 12B in PyTorch: Hugging Face's attention function and Lyra's, from rotated queries and
cached keys to concatenated heads. Projections, which are the same for both, are left out.
"""

from __future__ import annotations

from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import Gemma3TextConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from lyra.backends.torch_impl import LyraGemma3Attention
from lyra.backends.torch_impl.hf_cache import SlotKeys
from lyra.backends.torch_impl.layer import Call, attend_to
from lyra.backends.torch_impl.rope import inverse_frequencies
from lyra.backends.torch_impl.static import place_static, prepare_static
from lyra.spec.attention import StaticSpec
from lyra.spec.inputs import StaticLayer
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from ..row import Work

LAYER = 5
"""The first global layer."""


def hugging_face(static: int, live: int, batch: int = 1, tokens: int = 1, layers: int = 1, contexts: int = 1) -> Work:
    """sdpa_attention_forward over static + live keys of all heads in the cache of every row, of however many contexts.

    The last `tokens` of the live keys are the call's own; with more than one the model's causal mask is given.
    """
    del contexts  # each row holds its keys, equal to another's or not
    config = _config()
    with torch.device("meta"):
        module = Gemma3Attention(config, LAYER)
    q = _random(batch, config.num_attention_heads, tokens, config.head_dim)
    shape = (batch, config.num_key_value_heads, static + live, config.head_dim)
    caches = [(_random(*shape), _random(*shape)) for _ in range(layers)]
    mask = None if tokens == 1 else _causal(static + live, tokens)
    turns = cycle(caches)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(layers):
            k, v = next(turns)
            sdpa_attention_forward(module, q, k, v, mask, scaling=config.query_pre_attn_scalar**-0.5)

    return Work(run)


def lyra(
    static: int, live: int, batch: int = 1, tokens: int = 1, layers: int = 1, contexts: int = 1, dtype: str = "float32"
) -> Work:
    """`attend_to` of a LyraGemma3Attention: half of the heads read a context of `static` tokens, all the live keys.

    `contexts` is 1 for a context that all rows share, or the batch for one of their own in each. `dtype` is that of
    everything.
    """
    config, kind = _config(), getattr(torch, dtype)
    modules = [_module(config, contexts, static, kind) for _ in range(layers)]
    q = _random(batch, tokens, config.num_attention_heads, config.head_dim).to(kind)
    shape = (batch, config.num_key_value_heads, live, config.head_dim)
    caches = [(_random(*shape).to(kind), _random(*shape).to(kind)) for _ in range(layers)]
    pairs = list(zip(modules, caches, strict=True))

    @torch.inference_mode()
    def run() -> None:
        for module, (k, v) in pairs:
            live_keys = SlotKeys(k, v, None, tokens, live - tokens)
            attend_to(q, live_keys, module.layer, Call(None, None, module.static, None))

    return Work(run)


def expanded(static: int, live: int, batch: int = 1) -> Work:
    """The split without a shared context: in every step the context is expanded to the batch and put in front of the
    live keys of the Lyra heads, and torch's SDPA attends to them; vanilla heads attend to the live keys.
    """
    config = _config()
    q = _random(batch, config.num_attention_heads, 1, config.head_dim)
    half = config.num_key_value_heads // 2
    context = [_random(1, half, static, config.head_dim) for _ in "kv"]
    cache = [_random(batch, 2 * half, live, config.head_dim) for _ in "kv"]
    vanilla_q, lyra_q = q.chunk(2, dim=1)
    attend = partial(scaled_dot_product_attention, scale=config.query_pre_attn_scalar**-0.5, enable_gqa=True)

    @torch.inference_mode()
    def run() -> None:
        k, v = (part[:, :half] for part in cache)
        attend(vanilla_q, k, v)
        k, v = (
            torch.cat((shared.expand(batch, -1, -1, -1), own[:, half:]), dim=2)
            for shared, own in zip(context, cache, strict=True)
        )
        attend(lyra_q, k, v)

    return Work(run)


def _config() -> Gemma3TextConfig:
    spec = ModelSpec.preset("gemma-3-12b")
    layer = spec.layer(LAYER)
    return Gemma3TextConfig(
        vocab_size=2,
        hidden_size=layer.hidden_size,
        intermediate_size=1,
        num_hidden_layers=LAYER + 1,
        num_attention_heads=layer.num_attention_heads,
        num_key_value_heads=layer.num_key_value_heads,
        head_dim=layer.head_dim,
        query_pre_attn_scalar=round(layer.scale**-2),
        attn_implementation="sdpa",
    )


def _module(config: Any, contexts: int, static: int, dtype: torch.dtype) -> LyraGemma3Attention:
    """A layer without weights, with a random context."""
    spec = ModelSpec.from_hf_config(config.to_dict()).layer(LAYER)
    split = HeadSplit.half(spec)
    module = LyraGemma3Attention(config, LAYER, split=split).requires_grad_(False).to(dtype)
    for name in ("q_proj", "o_proj"):
        setattr(module, name, torch.nn.Identity())
    shape = (contexts, len(split.bind(spec).lyra_kv_heads), static, config.head_dim)
    slots = np.arange(static)[None].repeat(contexts, axis=0)
    context = StaticLayer(_random(*shape).numpy(), _random(*shape).numpy(), np.ones_like(slots, dtype=bool), slots)
    placed = place_static(module.spec, context, dtype)
    module.attend_to(placed and prepare_static(placed, inverse_frequencies(module.spec)), StaticSpec())
    return module


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _causal(keys: int, tokens: int) -> torch.Tensor:
    """The mask that the model gives for the last `tokens` of `keys`: bool [1,1,T,L]."""
    return (torch.arange(keys) <= torch.arange(keys - tokens, keys)[:, None])[None, None]
