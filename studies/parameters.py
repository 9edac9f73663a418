"""How many parameters the projections of an attention layer have, and what sharing KV heads saves of them."""

from __future__ import annotations

import math

from lyra.spec.attention import AttentionSpec


def projections(spec: AttentionSpec) -> dict[str, int]:
    """Parameters of a layer's projections q, k, v and o, biases included where the layer has them.

    qkv is what goes into the attention: the output projection, the same for any number of KV heads, is left out.
    """
    sizes = {name: math.prod(shape) for name, shape in spec.weight_shapes().items()}
    q, k, v, o = (sum(sizes[name] for name in sizes if name.startswith(f"{part}_proj")) for part in "qkvo")
    return {"q": q, "k": k, "v": v, "qkv": q + k + v, "o": o}


def groupings(num_heads: int) -> tuple[int, ...]:
    """Every legal number of KV heads, MHA first and MQA last."""
    return tuple(n for n in range(num_heads, 0, -1) if num_heads % n == 0)


def kind(num_heads: int, num_kv_heads: int) -> str:
    """The field's name of a grouping: MHA, GQA-n or MQA."""
    return "MHA" if num_kv_heads == num_heads else "MQA" if num_kv_heads == 1 else f"GQA-{num_kv_heads}"


def reduction(spec: AttentionSpec) -> float:
    """The share of the q+k+v parameters that a layer saves against MHA of the same sizes, from 0 to 2/3."""
    full = spec.replace(num_key_value_heads=spec.num_attention_heads, split=None)
    return 1 - projections(spec)["qkv"] / projections(full)["qkv"]
