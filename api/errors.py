"""What the front door refuses: a model that cannot be found or read, and a call that a model cannot serve."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or converted. The message says what was given and what to do."""


class ModelError(ValueError):
    """A call that this model cannot serve, such as text without a tokenizer or a context while one is attached."""
