"""Few shapes for many calls: what JAX compiles is one function a shape, so calls are rounded up to common ones.

A layer called through the protocol meets any number of tokens and slots and any mixture of modes. Tokens and slots are
padded to powers of two, the padding masked; a rule or window that a layer lacks is replaced by one that hides nothing.
A whole model pads its tokens in `tokens` and its contexts here, in finer steps: it reads them at every token it makes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lyra.spec.inputs import CallInputs

from .dtype import constant
from .layer import WIDEST, Numbers, Shape
from .static import PlacedStatic
from .visibility import LiveRule

SMALLEST_TOKENS, SMALLEST_SLOTS, SMALLEST_CONTEXT = 4, 16, 64

MOST_COMPILED = 256
"""Shapes that a jitted function is kept compiled for.

Each takes some sixty mapped regions of memory, gradients more, and Linux gives a process 65,530 of them. Beyond that
XLA does not fail, it crashes.
"""


def make_room(jitted: Any) -> None:
    """Let a jitted function forget what it has compiled, where that has become too much to keep one more."""
    if jitted._cache_size() >= MOST_COMPILED:
        jitted.clear_cache()


def round_up(count: int, smallest: int) -> int:
    """The next power of two, at least `smallest`; 1 stays 1, since single tokens are what decoding is made of."""
    return count if count <= 1 else max(smallest, 1 << (count - 1).bit_length())


def widen(array: np.ndarray, axis: int, length: int) -> np.ndarray:
    """The array with zeros behind it along an axis, up to a length; itself where it has it."""
    before, count = array.shape[:axis], array.shape[axis]
    if count == length:
        return array
    wide = np.zeros((*before, length, *array.shape[axis + 1 :]), array.dtype)
    wide[(*(slice(None) for _ in before), slice(count))] = array
    return wide


def pad_tokens(inputs: CallInputs) -> CallInputs:
    """The call with its tokens padded, behind the real ones, to a common number."""
    padded = round_up(inputs.mask.shape[1], SMALLEST_TOKENS)
    x, positions, mask = (widen(part, 1, padded) for part in inputs[:3])
    return inputs._replace(x=x, positions=positions, mask=mask)


def pad_slots(static: PlacedStatic) -> PlacedStatic:
    """The context with its slots padded to a common number, and a mask even where all of its own are visible."""
    slots = static.positions.shape[1]
    return _with_slots(static, max(SMALLEST_SLOTS, round_up(slots, SMALLEST_SLOTS)))


def pad_context(static: PlacedStatic, parts: int) -> PlacedStatic:
    """The same for the context of a whole model, in slots that can be spread over so many devices: another one of about
    its length compiles nothing.
    """
    slots = context_slots(static.positions.shape[1])
    return _with_slots(static, -(-slots // parts) * parts)


def context_slots(slots: int) -> int:
    """The slots that a context of a model is padded to: a multiple of 64, at most a sixteenth more beyond 1,024."""
    step = max(SMALLEST_CONTEXT, 1 << max((slots - 1).bit_length() - 5, 0))
    return max(1, -(-slots // step)) * step


def _with_slots(static: PlacedStatic, slots: int) -> PlacedStatic:
    k, v, positions = (np.asarray(part) for part in static[:3])
    mask = np.ones(positions.shape, dtype=bool) if static.mask is None else np.asarray(static.mask)
    return PlacedStatic(widen(k, 2, slots), widen(v, 2, slots), widen(positions, 1, slots), widen(mask, 1, slots))


def general(numbers: Numbers, shape: Shape) -> Numbers:
    """The same numbers with a live rule and a window in any case; those that were absent hide nothing."""
    every = constant(np.ones((shape.kv_heads, shape.query_heads // shape.kv_heads)), bool)
    return numbers._replace(
        window=constant(WIDEST, np.int32) if numbers.window is None else numbers.window,
        rule=LiveRule(earlier=every, own=every) if numbers.rule is None else numbers.rule,
    )
