"""The language model of the studies: its sizes, and the weights that both frameworks start from.

A Llama: RMSNorm, gated MLP with SiLU, RoPE, no bias, embeddings tied to the output. Weights carry the names and layouts
of Hugging Face's LlamaModel, which loads them as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from lyra.spec.attention import AttentionSpec, RopeSpec, grouped
from lyra.spec.base import SpecModel

from .cache import calculate_kv_cache_size
from .parameters import kind

INITIAL_STD = 0.02

Weights = Mapping[str, Any]
"""Arrays of a framework by the names that Hugging Face's LlamaModel has for them."""


class Operations(NamedTuple):
    """What the model is made of: a framework's own operations, on its own arrays."""

    embed: Callable[[Any, Any], Any]
    """tokens int [B,T], table [V,E] -> [B,T,E]."""
    linear: Callable[[Any, Any], Any]
    """x [B,T,in], weight [out,in] -> [B,T,out]."""
    rms_norm: Callable[[Any, Any, float], Any]
    """x, weight, eps -> x · rsqrt(mean(x²) + eps) · weight over the last axis."""
    silu: Callable[[Any], Any]
    attention: Callable[[AttentionSpec, Weights, Any, Any], tuple[Any, Any]]
    """The backend's GroupedQueryAttention with some weights, x [B,T,E], cache or None -> [B,T,E], cache with x's."""


class LMSpec(SpecModel):
    """Sizes of the model. num_kv_heads = num_heads is MHA, 1 MQA; head_dim is hidden_size / num_heads."""

    vocab_size: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    hidden_size: int = Field(default=128, gt=0)
    intermediate_size: int = Field(default=384, gt=0)
    num_layers: int = Field(default=4, gt=0)
    num_heads: int = Field(default=8, gt=0)
    rope_theta: float = Field(default=10_000.0, gt=0)
    norm_eps: float = Field(default=1e-4, gt=0)
    """A quarter of what the embeddings' mean square starts at. A smaller one lets a residual stream that nearly cancels
    blow gradients up: norms of 10 to 70 in single steps, where the loss begins to fall fast."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        _ = self.attention  # raises SpecError for heads that do not divide
        return self

    @property
    def attention(self) -> AttentionSpec:
        """One of the attention layers, all of which are the same."""
        return grouped(self.hidden_size, self.num_heads, self.num_kv_heads, rope=RopeSpec(theta=self.rope_theta))

    @property
    def kind(self) -> str:
        """MHA, GQA-n or MQA."""
        return kind(self.num_heads, self.num_kv_heads)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight by its name in Hugging Face's LlamaModel."""
        width, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, width)}
        for layer in range(self.num_layers):
            at = f"layers.{layer}"
            shapes[f"{at}.input_layernorm.weight"] = (width,)
            shapes |= {f"{at}.self_attn.{name}": shape for name, shape in self.attention.weight_shapes().items()}
            shapes[f"{at}.post_attention_layernorm.weight"] = (width,)
            shapes[f"{at}.mlp.gate_proj.weight"] = shapes[f"{at}.mlp.up_proj.weight"] = (inner, width)
            shapes[f"{at}.mlp.down_proj.weight"] = (width, inner)
        return shapes | {"norm.weight": (width,)}

    def parameters(self) -> int:
        """How many numbers the model learns."""
        return sum(int(np.prod(shape)) for shape in self.weight_shapes().values())

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of one row of so many tokens, in float32."""
        return calculate_kv_cache_size(
            self.num_layers, self.num_kv_heads, tokens, self.attention.head_dim, dtype="float32"
        )


def logits(
    of: Operations, spec: LMSpec, weights: Weights, tokens: Any, caches: Sequence[Any] | None = None
) -> tuple[Any, list[Any]]:
    """tokens int [B,T] -> logits [B,T,V], and every layer's cache with the call's tokens.

    Attention and a gated MLP (Shazeer 2020, "GLU Variants"), each behind a norm and added to what comes in.
    """
    eps, grown = spec.norm_eps, list[Any]()
    x = of.embed(tokens, weights["embed_tokens.weight"])
    for layer in range(spec.num_layers):
        at = f"layers.{layer}"
        attention = {name: weights[f"{at}.self_attn.{name}"] for name in spec.attention.weight_shapes()}
        before = of.rms_norm(x, weights[f"{at}.input_layernorm.weight"], eps)
        attended, cache = of.attention(spec.attention, attention, before, None if caches is None else caches[layer])
        grown.append(cache)
        x = x + attended
        between = of.rms_norm(x, weights[f"{at}.post_attention_layernorm.weight"], eps)
        gate, up = (of.linear(between, weights[f"{at}.mlp.{name}_proj.weight"]) for name in ("gate", "up"))
        x = x + of.linear(of.silu(gate) * up, weights[f"{at}.mlp.down_proj.weight"])
    return of.linear(of.rms_norm(x, weights["norm.weight"], eps), weights["embed_tokens.weight"]), grown


def initial_weights(spec: LMSpec, seed: int) -> dict[str, np.ndarray]:
    """Weights to start from, float32: norms 1, the rest normal with standard deviation 0.02.

    What is added to the residual stream (o_proj, down_proj) starts smaller by √(2 · layers), as in GPT-2. Every weight
    is drawn by its own name, and the first KV heads of MHA are those of GQA and MQA, so that models of one seed differ
    in nothing but the number of KV heads.
    """
    weights = {}
    for name, shape in spec.weight_shapes().items():
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = INITIAL_STD / np.sqrt(2 * spec.num_layers) if residual else INITIAL_STD
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        # Rows are drawn in order, so that fewer rows are the first of more.
        drawn = rng.standard_normal(shape) * std if len(shape) > 1 else np.ones(shape)
        weights[name] = drawn.astype(np.float32)
    return weights
