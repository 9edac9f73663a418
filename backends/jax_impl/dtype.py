"""The type of what stands between stages; within a stage everything is float32 (clause DTYPE)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16)}
Given: TypeAlias = Array if TYPE_CHECKING else Array | np.ndarray  # type: ignore[valid-type]
"""An array on the device, or one of NumPy that a compiled call takes there; type checkers take it for the former."""

BFLOAT16_EXPONENT, BFLOAT16_MANTISSA = 8, 7
"""Bits of a bfloat16."""


def constant(value: Any, dtype: Any = np.float32) -> Any:
    """A number or array of a spec, for a compiled call to take to the device: with jnp it would be a call by itself."""
    return np.asarray(value, dtype)


@jax.jit
def to_device(arrays: Any) -> Any:
    """Copies of many arrays on the device, in one call for all: device_put takes each by itself, and may share memory
    with the caller's.
    """
    return arrays


def enter(array: np.ndarray | Array, dtype: np.dtype[Any]) -> np.ndarray:
    """A float32 array, rounded to `dtype`. Clause DTYPE-1."""
    return np.asarray(array).astype(dtype, copy=False)


def store(x: Array, dtype: np.dtype[Any]) -> Array:
    """What a stage has made, float32, rounded once to the type it is kept in. Clause DTYPE-1.

    XLA may drop a conversion to bfloat16 that is followed by one back to float32, as too precise to matter; it keeps
    a `reduce_precision`.
    """
    if dtype != DTYPES["bfloat16"]:
        return x.astype(dtype)
    return lax.reduce_precision(x, BFLOAT16_EXPONENT, BFLOAT16_MANTISSA).astype(dtype)


def leave(x: np.ndarray | Array) -> np.ndarray:
    """The same values as a float32 array."""
    return np.asarray(x).astype(np.float32, copy=False)
