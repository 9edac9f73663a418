"""The type of what stands between stages; within a stage everything is float32 (clause DTYPE)."""

from __future__ import annotations

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def enter(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A float32 array as a tensor of its own, rounded to `dtype`. Clause DTYPE-1."""
    return torch.tensor(array).to(dtype)


def store(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a stage has made, float32, rounded once to the type it is kept in. Clause DTYPE-1."""
    return x.to(dtype)


def leave(x: torch.Tensor) -> np.ndarray:
    """The same values as a float32 array of its own: who writes to it changes no cache (ARRAYS-3)."""
    return x.detach().to("cpu", torch.float32, copy=True).numpy()
