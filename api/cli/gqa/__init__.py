"""lyra gqa: what sharing KV heads saves and what it costs."""

from . import counts, perplexity, speed, uptrain
from .group import gqa

__all__ = ["counts", "gqa", "perplexity", "speed", "uptrain"]
