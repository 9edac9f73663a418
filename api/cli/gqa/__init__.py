"""lyra gqa: what sharing KV heads saves and what it costs."""

from . import counts, speed, training
from .group import gqa

__all__ = ["counts", "gqa", "speed", "training"]
