"""`jax-module`: what people run of JAX, judged in its decoder."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lyra.spec.attention import AttentionSpec
from lyra.spec.sequential import SequentialSpec

from .jax_block import ModuleBlock
from .jax_layer import ModuleAttention


class JaxModule:
    """JAX's modules as its decoder has them. Found as `--backend jax-module`."""

    name = "jax-module"
    capabilities = frozenset({"static", "cache", "trace", "grad", "sequential", "bfloat16"})

    def fits(self, spec: AttentionSpec | SequentialSpec) -> str | None:
        """Why a decoder's layer cannot be of this spec; None where it can."""
        if isinstance(spec, SequentialSpec) and spec.source == "own" and spec.attention.sliding_window is not None:
            return "a sliding-window layer keeps a window of keys only, and a block that shares its cache needs all"
        return None

    def attention(
        self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], *, dtype: str = "float32"
    ) -> ModuleAttention:
        """The layer in a model of its own. Raises InputError."""
        return ModuleAttention(spec, weights, dtype)

    def sequential(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray]) -> ModuleBlock:
        """An injected block in a model of its own. Raises InputError."""
        return ModuleBlock(spec, weights)
