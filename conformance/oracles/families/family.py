"""What the oracles have to know of Hugging Face's classes of one family of models, and ask nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from lyra.spec.attention import AttentionSpec
from lyra.spec.families import LayerNorms


class Family(NamedTuple):
    """Hugging Face's unmodified classes and functions of a family.

    title             of the class of a layer's attention, for messages
    norms             of a decoder layer, see `lyra.spec.families`
    supports          why the attention cannot express a spec, or None if it can
    config            of a model of one layer whose attention is a spec that is supported
    attention, rotary, decoder_layer, causal_model  the classes
    cos_sin           cosines and sines [B,T,D] of positions [B,T] from a rotary embedding, for an attention, in the
                      type of the tensor given
    turn, eager       the functions that turn queries and keys, and that attend
    small             the config of a model that is small in every size and has every kind of layer of the family
    """

    title: str
    norms: LayerNorms
    supports: Callable[[AttentionSpec], str | None]
    config: Callable[[AttentionSpec], Any]
    attention: Any
    rotary: Any
    decoder_layer: Any
    causal_model: Any
    cos_sin: Callable[[Any, Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    turn: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    eager: Callable[..., Any]
    small: Callable[[], Any]

    def attention_half(self, layer: Any, x: torch.Tensor, around: Mapping[str, Any]) -> torch.Tensor:
        """A decoder layer's first half: x [B,T,E] and what its attention is given beside it, to h [B,T,E]."""
        attended, _ = layer.self_attn(hidden_states=self.entering(layer, x), **around)
        return x + normed(layer, self.norms.attention_out, attended)

    def entering(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        """What its attention gets of x [B,T,E]."""
        return normed(layer, self.norms.attention_in, x)

    def feed_forward_half(self, layer: Any, h: torch.Tensor) -> torch.Tensor:
        """Its second half: h [B,T,E] to the layer's output [B,T,E]."""
        fed = layer.mlp(normed(layer, self.norms.feed_forward_in, h))
        return h + normed(layer, self.norms.feed_forward_out, fed)


def normed(module: Any, name: str | None, x: torch.Tensor) -> torch.Tensor:
    """x through the norm that a module has under a name, or x itself where it has none."""
    norm = None if name is None else getattr(module, name, None)
    result: torch.Tensor = x if norm is None else norm(x)
    return result


def rope_table(spec: AttentionSpec) -> dict[str, object]:
    """RoPE of a layer as a config's `rope_parameters` have it."""
    assert spec.rope is not None
    if spec.rope.factor == 1.0:
        return {"rope_type": "default", "rope_theta": spec.rope.theta}
    return {"rope_type": "linear", "rope_theta": spec.rope.theta, "factor": spec.rope.factor}
