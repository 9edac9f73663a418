"""Hugging Face's own modules for an AttentionSpec: configuration and weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import check_weights

from .families import Family, expressing, supports

__all__ = ["ModuleCache", "Modules", "build", "config_of", "supports"]


class Modules(NamedTuple):
    """One layer as Hugging Face builds it: its attention, its rotary embedding, its configuration and its family."""

    attention: Any
    rotary: Any
    config: Any
    family: Family

    def cos_sin(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B,T,D] of positions [B,T], in the type of x."""
        return self.family.cos_sin(self.rotary, self.attention, x, positions)


def config_of(spec: AttentionSpec) -> tuple[Family, Any]:
    """The family whose attention is `spec`, and the configuration of a one-layer model of it. Raises SpecError."""
    family = expressing(spec)
    config = family.config(spec)
    config._attn_implementation = "eager"
    return family, config


def build(spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> Modules:
    """Hugging Face's modules with these weights, in float32 and evaluation mode.

    Writable, contiguous float32 arrays are shared with the module, not copied. Raises InputError, SpecError.
    """
    family, config = config_of(spec)
    with torch.device("meta"):  # no memory and no random initialisation: every parameter is assigned below
        attention = family.attention(config, layer_idx=0)
    state = {name: torch.from_numpy(_shareable(array)) for name, array in check_weights(spec, weights).items()}
    attention.load_state_dict(state, strict=True, assign=True)
    attention.scaling = spec.scale
    return Modules(attention.eval(), family.rotary(config), config, family)


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


def _shareable(array: np.ndarray) -> np.ndarray:
    return np.require(array, dtype=np.float32, requirements=("C", "W"))
