"""`torch-module`: what people run of PyTorch, judged in a model of Hugging Face's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lyra.spec.attention import AttentionSpec
from lyra.spec.sequential import SequentialSpec

from .torch_block import ModuleBlock
from .torch_layer import ModuleAttention


class TorchModule:
    """PyTorch's modules as a model of Hugging Face's has them. Found as `--backend torch-module`."""

    name = "torch-module"
    hardware = "CPU"
    capabilities = frozenset({"static", "cache", "trace", "reorder", "crop", "grad", "sequential"})

    def fits(self, spec: AttentionSpec | SequentialSpec) -> str | None:
        """Why Hugging Face's Gemma-3 cannot be a layer of this spec; None where it can."""
        layer = spec.attention if isinstance(spec, SequentialSpec) else spec
        if layer.qk_norm is None:
            return "Gemma3Attention always norms queries and keys"
        if layer.rope is None:
            return "Gemma3Attention always rotates queries and keys"
        if layer.hidden_size % layer.num_attention_heads:
            return "a Gemma3TextConfig asks for a hidden_size that is a multiple of its query heads"
        if layer.softcap is not None:
            return "Hugging Face's Gemma-3 ignores a softcap of scores, and GemmaInjector refuses a model with one"
        return None

    def attention(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> ModuleAttention:
        """The layer in a model of its own. Raises Unsupported, InputError."""
        return ModuleAttention(spec, weights)

    def sequential(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray]) -> ModuleBlock:
        """An injected block in a model of its own. Raises Unsupported, InputError."""
        return ModuleBlock(spec, weights)
