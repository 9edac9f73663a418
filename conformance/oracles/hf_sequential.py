"""Hugging Face's decoder layer around an injected block: its two halves, and the oracle's block between them.

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

from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer
from lyra.spec.model import ModelSpec
from lyra.spec.reference_sequential import own_keys, reference_sequential
from lyra.spec.sequential import SequentialSpec

from . import families
from .families import Family
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
        self.family, config = config_of(spec)
        config.intermediate_size = MLP_WIDTH * spec.hidden_size
        with torch.device("meta"):  # no memory and no random initialisation: every parameter is assigned below
            self.module = self.family.decoder_layer(config, layer_idx=0)
        state = {name: torch.tensor(array) for name, array in layer_weights(self.family, spec, weights, seed).items()}
        self.module.load_state_dict(state, strict=True, assign=True)
        self.module.self_attn.scaling = spec.scale
        self.module.eval()
        hidden, real = torch.zeros(*mask.shape, spec.hidden_size), torch.tensor(mask)
        rotary, attention = self.family.rotary(config), self.module.self_attn
        make_mask = create_causal_mask if spec.sliding_window is None else create_sliding_window_causal_mask
        self._around = {
            "position_embeddings": self.family.cos_sin(rotary, attention, hidden, torch.tensor(positions)),
            "attention_mask": make_mask(config=config, inputs_embeds=hidden, attention_mask=real, past_key_values=None),
        }

    @property
    def weights(self) -> dict[str, np.ndarray]:
        """The layer's state dict."""
        return {name: tensor.numpy() for name, tensor in self.module.state_dict().items()}

    @torch.inference_mode()
    def whole(self, x: np.ndarray) -> np.ndarray:
        """The forward of the layer itself: x [B,T,E] float32 to [B,T,E]."""
        output = self.module(torch.tensor(x), **self._around)
        return (output if isinstance(output, torch.Tensor) else output[0]).numpy()

    @torch.inference_mode()
    def attention_half(self, x: np.ndarray) -> np.ndarray:
        """x [B,T,E] to the residual stream h [B,T,E] behind self-attention's residual add: where a block stands."""
        return self.family.attention_half(self.module, torch.tensor(x), self._around).numpy()

    @torch.inference_mode()
    def feed_forward_half(self, h: np.ndarray) -> np.ndarray:
        """h [B,T,E] to the layer's output [B,T,E]: the pre-feed-forward norm and what follows it."""
        return self.family.feed_forward_half(self.module, torch.tensor(h)).numpy()


class InjectedLayer(nn.Module):
    """A decoder layer with the oracle's block between its halves, for one call over all live tokens, without padding.

    The block's weights are the layer's own (SEQUENTIAL-7); `model` is the spec of the layer's model.
    """

    def __init__(self, layer: nn.Module, block: SequentialSpec, static: StaticLayer | None, model: ModelSpec) -> None:
        super().__init__()
        self.family, self.name = families.of(model), model.family or ""
        self.layer = layer
        self.block = block
        self.static = static

    def forward(self, hidden_states: torch.Tensor, **around: Any) -> torch.Tensor:
        """hidden_states [B,T,E] -> [B,T,E]."""
        state = {name: tensor.detach().numpy() for name, tensor in self.layer.state_dict().items()}
        batch, tokens = hidden_states.shape[:2]
        positions = np.broadcast_to(np.arange(tokens), (batch, tokens))
        weights, own = self.block.weights_of(state, self.name), None
        if self.block.source == "own":
            entering = self.family.entering(self.layer, hidden_states).numpy()
            own = own_keys(self.block.attention, weights, entering, positions=positions)
        h = self.family.attention_half(self.layer, hidden_states, around).numpy()
        stages = reference_sequential(self.block, weights, h, positions=positions, static=self.static, own=own)
        return self.family.feed_forward_half(self.layer, torch.from_numpy(stages["output"].value.astype(np.float32)))


def layer_weights(
    family: Family, spec: AttentionSpec, weights: Mapping[str, np.ndarray], seed: int
) -> dict[str, np.ndarray]:
    """A state dict of the whole layer: a block's weights where they belong, the rest drawn from `seed`."""
    rng, width = np.random.default_rng(seed), spec.hidden_size
    inner = MLP_WIDTH * width
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    around = (family.norms.feed_forward_in, family.norms.feed_forward_out)
    shapes |= {f"{name}.weight": (width,) for name in around if name is not None}
    drawn = {name: rng.normal(0.0, shape[-1] ** -0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = {"input_norm": family.norms.attention_in, "output_norm": family.norms.attention_out}
    taken = {f"{theirs}.weight": weights[f"{ours}.weight"] for ours, theirs in norms.items() if theirs is not None}
    return drawn | taken | {f"self_attn.{name}": weights[name] for name in spec.weight_shapes()}
