"""The PyTorch backend. Imports torch only; transformers comes in with a whole model, once its version is checked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .attention_backend import TorchAttention
from .backend import CudaBackend, TorchBackend

if TYPE_CHECKING:
    from .families.gemma3 import LyraForCausalLM, LyraGemma3Attention
    from .injector import GemmaInjector

__all__ = [
    "CudaBackend",
    "GemmaInjector",
    "LyraForCausalLM",
    "LyraGemma3Attention",
    "TorchAttention",
    "TorchBackend",
]

_MODEL_LEVEL = {
    "GemmaInjector": "injector",
    "LyraForCausalLM": "families.gemma3",
    "LyraGemma3Attention": "families.gemma3",
}


def __getattr__(name: str) -> Any:
    """What needs transformers, imported when asked for. Raises ImportError for a transformers that does not fit."""
    if name not in _MODEL_LEVEL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .versions import check_transformers

    check_transformers()
    return getattr(importlib.import_module(f"{__name__}.{_MODEL_LEVEL[name]}"), name)
