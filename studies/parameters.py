"""How many parameters the projections of an attention layer have, and what sharing KV heads saves of them."""

from __future__ import annotations

from dataclasses import dataclass

from lyra.spec.attention import AttentionSpec


@dataclass(frozen=True)
class Projections:
    """Parameters of one layer's four projections, biases included where the layer has them."""

    q: int
    k: int
    v: int
    o: int

    @property
    def qkv(self) -> int:
        """What goes into the attention: the output projection, the same for any number of KV heads, is left out."""
        return self.q + self.k + self.v


def projections(spec: AttentionSpec) -> Projections:
    """The parameters of a layer, by projection."""
    sizes = {"q": 0, "k": 0, "v": 0, "o": 0}
    for name, shape in spec.weight_shapes().items():
        projection, _, _ = name.partition("_proj")
        if projection in sizes:
            sizes[projection] += shape[0] * (shape[1] if len(shape) > 1 else 1)
    return Projections(**sizes)


def groupings(num_heads: int) -> tuple[int, ...]:
    """Every legal number of KV heads, MHA first and MQA last."""
    return tuple(n for n in range(num_heads, 0, -1) if num_heads % n == 0)


def kind(num_heads: int, num_kv_heads: int) -> str:
    """The field's name of a grouping: MHA, GQA-n or MQA."""
    return "MHA" if num_kv_heads == num_heads else "MQA" if num_kv_heads == 1 else f"GQA-{num_kv_heads}"


def reduction(spec: AttentionSpec) -> float:
    """The share of the q+k+v parameters that a layer saves against MHA of the same sizes, from 0 to 2/3."""
    full = spec.replace(num_key_value_heads=spec.num_attention_heads, split=None)
    return 1 - projections(spec).qkv / projections(full).qkv
