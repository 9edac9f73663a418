"""What an answer must be before its values can be compared: NumPy arrays, by the right names, types and shapes.

Whatever is not is told in one sentence, which names the stage, what came and what was expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from lyra.spec.attention import AttentionSpec
from lyra.spec.sequential import SequentialSpec

AXES = {
    "B": "rows",
    "T": "tokens",
    "Hq": "heads",
    "Hkv": "heads",
    "D": "the elements of a head",
    "E": "the elements of a token",
    "Bc": "contexts",
    "Hs": "heads",
    "S": "slots",
    "out": "what comes out",
    "in": "what goes in",
}
"""Names of axes, and what lies along them."""

Axes = tuple[str, ...]
OUTPUT: Axes = ("B", "T", "E")


class Malformed(ValueError):
    """An answer that cannot be compared. `stage` is the trace entry that is at fault, None for anything else."""

    def __init__(self, message: str, stage: str | None = None) -> None:
        super().__init__(message)
        self.stage = stage


def check_result(
    result: Any, spec: AttentionSpec | SequentialSpec, batch: int, tokens: int, past: int, *, traced: bool
) -> tuple[np.ndarray, Any, dict[str, np.ndarray]]:
    """Output, cache and, where it was `traced`, the stages (ORDER-3, SEQUENTIAL-8) of a call of `tokens` tokens.

    `past` tokens came in calls before it. Raises Malformed.
    """
    if not isinstance(result, tuple) or len(result) != 3:
        size = f" of {len(result)}" if isinstance(result, tuple) else ""
        raise Malformed(f"the call gave a {type(result).__name__}{size}, expected Result(output, cache, trace)")
    output, cache, trace = result
    sizes = sizes_of(spec, batch, tokens)
    output = check_array("the output", output, OUTPUT, sizes, past)
    return output, cache, check_trace(trace, spec, sizes, past) if traced else {}


def sizes_of(spec: AttentionSpec | SequentialSpec, batch: int, tokens: int) -> dict[str, int]:
    """How long every axis of a call is."""
    layer = spec.attention if isinstance(spec, SequentialSpec) else spec
    heads = {"Hq": layer.num_attention_heads, "Hkv": layer.num_key_value_heads, "D": layer.head_dim}
    return {"B": batch, "T": tokens, **heads, "E": layer.hidden_size}


def stage_axes(name: str) -> Axes:
    """The axes of a trace entry (ORDER-3, SEQUENTIAL-8)."""
    kinds: dict[str, Axes] = {"q": ("B", "T", "Hq", "D"), "k": ("B", "T", "Hkv", "D"), "v": ("B", "T", "Hkv", "D")}
    return kinds["q"] if name == "heads" else kinds.get(name.partition("_")[0], OUTPUT)


def check_trace(
    trace: Any, spec: AttentionSpec | SequentialSpec, sizes: Mapping[str, int], past: int = 0
) -> dict[str, np.ndarray]:
    """The stages of a trace: these, in this order, each of its own shape. Raises Malformed."""
    if not isinstance(trace, Mapping):
        raise Malformed(
            f"the trace is a {type(trace).__name__}, expected a dict of arrays by the names of their stages"
        )
    names, wanted = tuple(trace), spec.trace_names()
    listed = f"the stages of this layer are {', '.join(wanted)}"
    missing = [name for name in wanted if name not in names]
    unknown = [str(name) for name in names if name not in wanted]
    if missing:
        instead = f" and has {', '.join(unknown)}, which is none" if unknown else ""
        raise Malformed(f"the trace lacks stage {missing[0]}{instead}; {listed}", missing[0])
    if unknown:
        raise Malformed(f"the trace has {', '.join(unknown)}, which this layer does not have; {listed}", unknown[0])
    if names != wanted:
        first = next(got for got, name in zip(names, wanted, strict=True) if got != name)
        raise Malformed(f"the trace has its stages in the order {', '.join(names)}; {listed}, in this order", first)
    return {name: check_stage(name, trace[name], sizes, past) for name in wanted}


def check_stage(name: str, value: Any, sizes: Mapping[str, int], past: int = 0) -> np.ndarray:
    """One entry of a trace. Raises Malformed."""
    try:
        return check_array(f"stage {name}", value, stage_axes(name), sizes, past)
    except Malformed as error:
        raise Malformed(str(error), name) from None


def check_array(what: str, value: Any, axes: Axes, sizes: Mapping[str, int], past: int = 0) -> np.ndarray:
    """A float32 array with these axes, `what` being its name in a sentence. Raises Malformed."""
    shape = tuple(sizes[axis] for axis in axes)
    wanted = f"[{','.join(axes)}] = {shape}"
    if not isinstance(value, np.ndarray):
        raise Malformed(f"{what} is a {type(value).__name__}, expected a NumPy array float32 {wanted}")
    if value.shape != shape:
        raise Malformed(f"{what} has shape {value.shape}, expected {wanted}{_why(value.shape, axes, sizes, past)}")
    if value.dtype != np.float32:
        raise Malformed(f"{what} has dtype {value.dtype}, expected float32 {wanted}")
    return value


def check_values(what: str, value: Any, wanted: np.ndarray) -> np.ndarray:
    """An array of floating-point numbers in the shape of `wanted`. Raises Malformed."""
    if not isinstance(value, np.ndarray):
        raise Malformed(f"{what}: got a {type(value).__name__}, expected a NumPy array of shape {wanted.shape}")
    if value.shape != wanted.shape:
        raise Malformed(f"{what}: got shape {value.shape}, expected {wanted.shape}")
    if not np.issubdtype(value.dtype, np.floating):
        raise Malformed(f"{what}: got dtype {value.dtype}, expected floating-point numbers {wanted.shape}")
    return value


def _why(got: tuple[int, ...], axes: Axes, sizes: Mapping[str, int], past: int) -> str:
    """The likeliest reason for a shape, where there is one: `: heads and tokens are exchanged`."""
    wanted = tuple(sizes[axis] for axis in axes)
    for first, other in sorted(combinations(range(len(axes)), 2), key=lambda pair: pair != (1, 2)):
        swapped = list(wanted)
        swapped[first], swapped[other] = wanted[other], wanted[first]
        if got == tuple(swapped):
            return f": {AXES[axes[other]]} and {AXES[axes[first]]} are exchanged"
    if got == wanted[1:]:
        return f": the axis of {AXES[axes[0]]} is missing"
    if len(wanted) == 4 and got == (*wanted[:2], wanted[2] * wanted[3]):
        return ": the heads are not apart"
    if past and got == (wanted[0], past + wanted[1], *wanted[2:]):
        return f": it holds the {past} tokens of earlier calls too"
    if "Hkv" in axes and got == tuple(sizes["Hq" if axis == "Hkv" else axis] for axis in axes):
        return ": there is one for each query head, not for each KV head"
    return ""
