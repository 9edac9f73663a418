"""lyra gqa: what sharing KV heads saves and what it costs."""

from . import counts, perplexity
from .group import gqa

__all__ = ["counts", "gqa", "perplexity"]
