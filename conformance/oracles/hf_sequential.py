"""Hugging Face's Gemma3DecoderLayer around an injected block: its two halves, and the oracle's block between them.

Every number is made by the layer's own, unmodified modules; this module only says in which order, as the layer's
`forward` does: behind self-attention's residual add stands the block, and then comes the feed-forward half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3RotaryEmbedding

from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer
from lyra.spec.reference_sequential import own_keys, reference_sequential
from lyra.spec.sequential import SequentialSpec

from .hf_modules import config_of

MLP_WIDTH = 2
"""The feed-forward part of the layer is this many times as wide as the residual stream."""


class DecoderLayerOracle:
    """One decoder layer of Hugging Face's, over all live tokens of a sequence at once.

    `weights` are a block's, by its names: the layer's own. The feed-forward part and its norms are drawn from `seed`.
    Positions [B,T] int and mask [B,T] bool belong to every call; in a sliding layer the real tokens of a row are
    consecutive. Raises SpecError for a spec that Hugging Face cannot express.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        weights: Mapping[str, np.ndarray],
        positions: np.ndarray,
        mask: np.ndarray,
        seed: int = 0,
    ) -> None:
        config = config_of(spec)
        config.intermediate_size = MLP_WIDTH * spec.hidden_size
        with torch.device("meta"):  # no memory and no random initialisation: every parameter is assigned below
            self.module = Gemma3DecoderLayer(config, layer_idx=0)
        state = {name: torch.tensor(array) for name, array in layer_weights(spec, weights, seed).items()}
        self.module.load_state_dict(state, strict=True, assign=True)
        self.module.self_attn.scaling = spec.scale
        self.module.eval()
        hidden, real = torch.zeros(*mask.shape, spec.hidden_size), torch.tensor(mask)
        rotary = Gemma3RotaryEmbedding(config)
        make_mask = create_causal_mask if spec.sliding_window is None else create_sliding_window_causal_mask
        self._around = {
            "position_embeddings": rotary(hidden, torch.tensor(positions), self.module.self_attn.layer_type),
            "attention_mask": make_mask(config=config, inputs_embeds=hidden, attention_mask=real, past_key_values=None),
        }

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The layer's state dict."""
        return {name: tensor.numpy() for name, tensor in self.module.state_dict().items()}

    @torch.inference_mode()
    def whole(self, x: np.ndarray) -> np.ndarray:
        """`Gemma3DecoderLayer.forward` itself: x [B,T,E] float32 to [B,T,E]."""
        output = self.module(torch.tensor(x), **self._around)
        return (output if isinstance(output, torch.Tensor) else output[0]).numpy()

    @torch.inference_mode()
    def attention_half(self, x: np.ndarray) -> np.ndarray:
        """x [B,T,E] to the residual stream h [B,T,E] behind self-attention's residual add: where a block stands."""
        return attention_half(self.module, torch.tensor(x), self._around).numpy()

    @torch.inference_mode()
    def feed_forward_half(self, h: np.ndarray) -> np.ndarray:
        """h [B,T,E] to the layer's output [B,T,E]: the pre-feed-forward norm and what follows it."""
        return feed_forward_half(self.module, torch.tensor(h)).numpy()


def attention_half(layer: Gemma3DecoderLayer, x: torch.Tensor, around: Mapping[str, Any]) -> torch.Tensor:
    """A decoder layer's first half: x [B,T,E] and what its attention is given beside it, to h [B,T,E]."""
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **around)
    return x + layer.post_attention_layernorm(attended)


def feed_forward_half(layer: Gemma3DecoderLayer, h: torch.Tensor) -> torch.Tensor:
    """Its second half: h [B,T,E] to the layer's output [B,T,E]."""
    return h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))


class InjectedLayer(nn.Module):
    """A decoder layer with the oracle's block between its halves, for one call over all live tokens, without padding.

    The block's weights are the layer's own (SEQUENTIAL-7).
    """

    def __init__(self, layer: Gemma3DecoderLayer, block: SequentialSpec, static: StaticLayer | None) -> None:
        super().__init__()
        self.layer = layer
        self.block = block
        self.static = static

    def forward(self, hidden_states: torch.Tensor, **around: Any) -> torch.Tensor:
        """hidden_states [B,T,E] -> [B,T,E]."""
        state = {name: tensor.detach().numpy() for name, tensor in self.layer.state_dict().items()}
        batch, tokens = hidden_states.shape[:2]
        positions = np.broadcast_to(np.arange(tokens), (batch, tokens))
        weights, own = self.block.weights_of(state), None
        if self.block.source == "own":
            entering = self.layer.input_layernorm(hidden_states).numpy()
            own = own_keys(self.block.attention, weights, entering, positions=positions)
        h = attention_half(self.layer, hidden_states, around).numpy()
        stages = reference_sequential(self.block, weights, h, positions=positions, static=self.static, own=own)
        return feed_forward_half(self.layer, torch.from_numpy(stages["output"].value.astype(np.float32)))


def layer_weights(spec: AttentionSpec, weights: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """A state dict of the whole layer: a block's weights where they belong, the rest drawn from `seed`."""
    rng, width = np.random.default_rng(seed), spec.hidden_size
    inner = MLP_WIDTH * width
    shapes = {
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "pre_feedforward_layernorm.weight": (width,),
        "post_feedforward_layernorm.weight": (width,),
    }
    drawn = {name: rng.normal(0.0, shape[-1] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    return drawn | {
        "input_layernorm.weight": weights["input_norm.weight"],
        "post_attention_layernorm.weight": weights["output_norm.weight"],
        **{f"self_attn.{name}": weights[name] for name in spec.weight_shapes()},
    }
