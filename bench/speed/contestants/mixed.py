"""Lyra's PyTorch layer in one process with a framework that has just worked: what the frame keeps apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from ..row import Framework, Work

WIDTH = 1024
"""Of the square matrices that the neighbour multiplies before every step, untimed."""


def lyra_beside(neighbour: Framework | Literal["nobody"], static: int, live: int) -> Work:
    """A decode step right after a matrix product of `neighbour`, in the same process."""
    from .layer_torch import lyra

    return Work(lyra(static, live).run, None if neighbour == "nobody" else _product(neighbour))


def _product(framework: Framework) -> Callable[[], object]:
    if framework == "torch":
        import torch

        square = torch.ones(WIDTH, WIDTH)
        return lambda: square @ square
    import jax
    import jax.numpy as jnp

    other, multiply = jnp.ones((WIDTH, WIDTH)), jax.jit(jnp.matmul)
    return lambda: multiply(other, other).block_until_ready()
