"""Whether live keys, which Hugging Face turns, are turned as static keys are."""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedModel

from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec

from .families import of_text
from .rope import inverse_frequencies

SAME, ROUNDED, SMALLEST = 1e-5, 2**-8, 6e-8
"""How far a frequency may be off, relative to itself, to be the same, and to be the same in bfloat16; and what float16
cannot tell from 0."""


def check_rope(text: PreTrainedModel, spec: ModelSpec) -> None:
    """Hold the frequencies of the global layers in the model to those of its spec, by which static keys are turned.

    Warns where they have been rounded, as `model.bfloat16()` does with everything. Raises InputError where they are
    others, since the config was changed after the model was made from it.
    """
    buffer, rope = of_text(text).frequencies(text), spec.attention.rope
    expected = inverse_frequencies(spec.attention)
    if buffer is None or buffer.is_meta or rope is None or expected is None:
        return
    off = (buffer.detach().to("cpu", torch.float64) - expected).abs()
    if not (off <= ROUNDED * expected + SMALLEST).all():
        raise InputError(
            f"the config's RoPE has theta {rope.theta:g} and factor {rope.factor:g}, and the model turns its keys by "
            f"other frequencies: the config was changed after the model was made; make the model from it again"
        )
    if (off > SAME * expected).any():
        warnings.warn(
            f"the model's RoPE frequencies have been rounded to {buffer.dtype} with everything else; at position 1,000 "
            f"the text is up to {1_000 * off.max().item():.2g} radians off from a context. Load the model with "
            f"dtype=…, which leaves them as they are",
            stacklevel=4,
        )
