"""Gemma-3: norms with weight 1 + w, and GELU."""

from __future__ import annotations

import jax
from jax import Array

from lyra.spec.families.gemma3 import GEMMA3

from .family import Family


def gelu_tanh(x: Array) -> Array:
    """GELU by its approximation with tanh, which PyTorch calls gelu_pytorch_tanh."""
    return jax.nn.gelu(x, approximate=True)


FAMILY = Family(name=GEMMA3.name, activations={GEMMA3.activation: gelu_tanh})
