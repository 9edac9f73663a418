"""Hugging Face's own Gemma-3 modules for an AttentionSpec: configuration, weights, and what they can express."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3RotaryEmbedding

from lyra.spec.attention import AttentionSpec, RopeSpec
from lyra.spec.errors import SpecError
from lyra.spec.inputs import check_weights

FULL, SLIDING = "full_attention", "sliding_attention"


class Modules(NamedTuple):
    """One layer as Hugging Face builds it: its attention, its rotary embedding and its configuration."""

    attention: Gemma3Attention
    rotary: Gemma3RotaryEmbedding
    config: Gemma3TextConfig

    def cos_sin(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B,T,D] of positions [B,T], in the type of x."""
        cos, sin = self.rotary(x, positions, self.attention.layer_type)
        return cos, sin


def supports(spec: AttentionSpec) -> str | None:
    """Why Hugging Face's Gemma-3 cannot express a spec, or None if it can."""
    if spec.qk_norm is None:
        return "qk_norm is None; Gemma3Attention always norms queries and keys"
    if spec.rope is None:
        return "rope is None; Gemma3Attention always rotates queries and keys"
    return None


def config_of(spec: AttentionSpec) -> Gemma3TextConfig:
    """The configuration of a one-layer Gemma-3 whose attention is `spec`. Raises SpecError if `supports` objects."""
    reason = supports(spec)
    if reason is not None:
        raise SpecError(f"the Hugging Face oracle cannot express this spec: {reason}")
    assert spec.rope is not None
    assert spec.qk_norm is not None
    layer_type = FULL if spec.sliding_window is None else SLIDING
    config = Gemma3TextConfig(
        # The class asks for a width that the heads divide, though Gemma-3 has its own head_dim: set below.
        hidden_size=spec.num_attention_heads * spec.head_dim,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        num_hidden_layers=1,
        layer_types=[layer_type],
        rope_parameters={layer_type: _rope_parameters(spec.rope)},
        rms_norm_eps=spec.qk_norm.eps,
        # The field holds integers only; `build` sets the exact scale on the module.
        query_pre_attn_scalar=max(1, round(spec.scale**-2)),
        attention_bias=spec.bias,
        sliding_window=spec.sliding_window,
        attn_logit_softcapping=spec.softcap,
    )
    config.hidden_size = spec.hidden_size
    config._attn_implementation = "eager"
    return config


def build(spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> Modules:
    """Hugging Face's modules with these weights, in float32 and evaluation mode.

    Writable, contiguous float32 arrays are shared with the module, not copied. Raises InputError, SpecError.
    """
    config = config_of(spec)
    with torch.device("meta"):  # no memory and no random initialisation: every parameter is assigned below
        attention = Gemma3Attention(config, layer_idx=0)
    state = {name: torch.from_numpy(_shareable(array)) for name, array in check_weights(spec, weights).items()}
    attention.load_state_dict(state, strict=True, assign=True)
    attention.scaling = spec.scale
    return Modules(attention.eval(), Gemma3RotaryEmbedding(config), config)


class ModuleCache:
    """The modules of the last few (spec, weights) pairs, by identity of the weight arrays.

    Only modules that share their arrays' memory are kept, so that a change made in place is always seen; the arrays
    are kept with them, so that an identity is never reused.
    """

    def __init__(self, size: int = 32) -> None:
        self._size = size
        self._kept: OrderedDict[tuple[object, ...], tuple[Modules, tuple[np.ndarray, ...]]] = OrderedDict()

    def get(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> Modules:
        """The modules of this pair, built where they are not at hand. Raises InputError, SpecError."""
        key = (spec, *((name, id(weights[name])) for name in sorted(weights)))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        modules = build(spec, weights)
        if all(isinstance(array, np.ndarray) and _shareable(array) is array for array in weights.values()):
            self._kept[key] = (modules, tuple(weights.values()))
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return modules


def _rope_parameters(rope: RopeSpec) -> dict[str, object]:
    if rope.factor == 1.0:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}


def _shareable(array: np.ndarray) -> np.ndarray:
    return np.require(array, dtype=np.float32, requirements=("C", "W"))
