"""The PyTorch backend. Imports torch only; transformers comes in when a whole model is loaded."""

from .backend import TorchAttention, TorchBackend

__all__ = ["TorchAttention", "TorchBackend"]
