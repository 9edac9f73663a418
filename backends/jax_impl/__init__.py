"""The JAX backend. Flax is imported only where a whole model is loaded."""

from .backend import JaxBackend

__all__ = ["JaxBackend"]
