"""What to say of a model whose numbers are not finite: where that begins, and what to do. No numeric code."""

from __future__ import annotations

import numpy as np

from .errors import NotFiniteError

LARGEST = {"float16": "65,504", "bfloat16": "3.4e38", "float32": "3.4e38"}
"""Where the numbers of a type end."""


def not_finite(dtype: str, finite: np.ndarray, mask: np.ndarray, otherwise: str) -> NotFiniteError:
    """The error of a model that gave NaN or infinity.

    finite [L+1,B,T] bool says of which tokens the embedding, then the output of each layer, is finite; mask [B,T] is
    False at padding. Where all of that is finite, `otherwise` names what is not.
    """
    wrong = np.argwhere(~finite & mask)
    where = otherwise
    if len(wrong):
        stage, row, token = (int(index) for index in wrong[0])
        where = f"the output of layer {stage - 1}" if stage else "the embedding"
        where += f" at token {token}" + (f" of row {row}" if len(mask) > 1 else "")
    return NotFiniteError(f"the model, in {dtype}, gives NaN or infinity, first in {where}. {_advice(dtype)}")


def first_token(values: np.ndarray) -> int:
    """The first token of k or v [1,Hkv,S,D] that is not finite."""
    return int(np.argmin(np.isfinite(values).all(axis=(0, 1, 3))))


def _advice(dtype: str) -> str:
    largest = LARGEST.get(dtype, "some number")
    if dtype == "float16":
        return f"The numbers of float16 end at {largest}: load the model with dtype='bfloat16' or dtype='float32'"
    return (
        f"The numbers of {dtype} end at {largest}: look for NaN, infinity and very large numbers in the weights and in "
        f"the attached context"
    )
