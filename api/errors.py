"""What the front door refuses: a model that cannot be found or read, and a call that a model cannot serve."""

from __future__ import annotations

from lyra.spec.errors import CheckpointError

__all__ = ["CheckpointError", "ModelError"]


class ModelError(ValueError):
    """A call that this model cannot serve, such as text without a tokenizer or a context while one is attached."""
