"""What may go into an attention call, checked once at the door of every backend. No numeric code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol, cast, get_args

import numpy as np

from .arguments import forwards, is_whole, listed, shown
from .array_types import Bool, Float, Int
from .attention import AttentionSpec
from .errors import InputError
from .sequential import SequentialSpec

Dtype = Literal["float32", "bfloat16"]
"""The types that a layer may compute in (clause DTYPE)."""


class StaticLayer(NamedTuple):
    """One layer's static keys and values, for the KV heads the Lyra stream reads, in ascending order.

    k, v       [Bc, Hs, S, D] float32; k normed and unrotated (clause STORED)
    mask       [Bc, S] bool; False hides a slot from every head and row (clause MASKED)
    positions  [Bc, S] int; where the static tokens sit (clause POSITION)
    Bc is 1 (one context for all rows) or B.
    """

    k: Float[np.ndarray, "Bc Hs S D"]
    v: Float[np.ndarray, "Bc Hs S D"]
    mask: Bool[np.ndarray, "Bc S"]
    positions: Int[np.ndarray, "Bc S"]


class CallInputs(NamedTuple):
    """The arguments of a call, checked: x float32, positions int64, mask bool, static or None."""

    x: Float[np.ndarray, "B T E"]
    positions: Int[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]
    static: StaticLayer | None


def check_call(
    spec: AttentionSpec,
    x: np.ndarray,
    positions: np.ndarray,
    mask: np.ndarray | None,
    static: StaticLayer | None,
) -> CallInputs:
    """Check the arguments of an attention call against the spec and fill in an absent mask.

    `static` comes back as None where the spec has no Lyra heads: nothing reads it. Raises InputError.
    """
    x = np.asarray(x)
    if x.ndim != 3 or x.shape[2] != spec.hidden_size:
        raise InputError(f"x has shape {x.shape}; expected [batch, tokens, {spec.hidden_size}]")
    batch, tokens = x.shape[:2]
    if not np.issubdtype(x.dtype, np.floating):
        raise InputError(f"x has dtype {x.dtype}; expected float32")
    positions = np.asarray(positions)
    if positions.shape != (batch, tokens) or not np.issubdtype(positions.dtype, np.integer):
        raise InputError(
            f"positions has shape {positions.shape} and dtype {positions.dtype}; expected integers [{batch}, {tokens}]"
        )
    mask = np.ones((batch, tokens), dtype=bool) if mask is None else np.asarray(mask)
    if mask.shape != (batch, tokens) or mask.dtype != np.bool_:
        raise InputError(f"mask has shape {mask.shape} and dtype {mask.dtype}; expected bool [{batch}, {tokens}]")
    if static is not None:
        static = check_static(spec, static, batch)
    return CallInputs(
        np.ascontiguousarray(x, dtype=np.float32),
        forwards(positions.astype(np.int64, copy=False)),
        forwards(mask),
        static if spec.lyra_q_heads else None,
    )


def check_block_call(
    spec: SequentialSpec,
    h: np.ndarray,
    positions: np.ndarray,
    mask: np.ndarray | None,
    static: StaticLayer | None,
    cache: object | None,
) -> CallInputs:
    """Check the arguments of a block's call, h [B,T,E] being its x. Raises InputError (clause SEQUENTIAL)."""
    if spec.source == "own":
        if static is not None:
            raise InputError(
                "a block with source='own' reads the cache of its layer and no context, but a static layer was given; "
                "leave it out or take source='external'"
            )
        if cache is None:
            raise InputError(
                "a block with source='own' needs the cache that its layer's own attention returned for these tokens, "
                "and none was given"
            )
    return check_call(spec.attention, h, positions, mask, static)


def check_own_cache(
    spec: AttentionSpec, inputs: CallInputs, heads: tuple[int, int], mask: np.ndarray, positions: np.ndarray
) -> None:
    """Check a cache that a block shares with its layer: it must end with the tokens of the call (SEQUENTIAL-6).

    heads are the KV heads and head_dim that it holds, mask and positions [B,L] its tokens. Raises InputError.
    """
    if heads != (spec.num_key_value_heads, spec.head_dim):
        raise InputError(
            f"the cache holds {heads[0]} KV heads of {heads[1]}; the block reads {spec.num_key_value_heads} of "
            f"{spec.head_dim}: give the cache of the block's own layer"
        )
    rows, tokens = inputs.mask.shape
    if len(mask) != rows:
        raise InputError(f"the cache has {len(mask)} rows, x has {rows}; give the cache of these rows")
    last = slice(max(0, mask.shape[1] - tokens), None)
    same = mask.shape[1] >= tokens and np.array_equal(mask[:, last], inputs.mask)
    if not same or not np.array_equal(positions[:, last][inputs.mask], inputs.positions[inputs.mask]):
        raise InputError(
            f"the cache, of {mask.shape[1]} tokens, does not end with the {tokens} tokens of this call; call the "
            f"layer's own attention with them first and give the block the cache that it returned"
        )


def check_rows(rows: Sequence[int] | np.ndarray, batch: int) -> np.ndarray:
    """The rows to select of a cache of `batch` rows, repeats allowed, as int64 [rows]. Raises InputError."""
    chosen = np.asarray(rows)
    if chosen.ndim != 1 or not chosen.size or not np.issubdtype(chosen.dtype, np.integer):
        raise InputError(
            f"reorder: rows has shape {chosen.shape} and dtype {chosen.dtype}; give a list of integers, one a row"
        )
    if chosen.min() < 0 or chosen.max() >= batch:
        raise InputError(f"reorder: rows are {chosen.tolist()}; the cache has rows 0 to {batch - 1}")
    return chosen.astype(np.int64)


def check_length(length: int, tokens: int) -> int:
    """How many of a cache's `tokens` to keep. Raises InputError."""
    if not is_whole(length) or not 0 <= length <= tokens:
        raise InputError(f"crop: length is {shown(length)}; the cache holds {tokens} tokens, so give 0 to {tokens}")
    return int(length)


def check_static(spec: AttentionSpec, static: StaticLayer, batch: int) -> StaticLayer:
    """Check one layer's static K/V against the spec and the batch. Raises InputError."""
    k, v, mask, positions = (forwards(np.asarray(part)) for part in static)
    kv_heads = len(spec.lyra_kv_heads)
    if k.ndim != 4 or v.shape != k.shape:
        raise InputError(f"static k {k.shape} and v {v.shape} must both be [1 or batch, kv_heads, tokens, head_dim]")
    if k.shape[1] != kv_heads:
        raise InputError(
            f"static k and v hold {k.shape[1]} KV heads; the split's Lyra heads read {kv_heads}: {spec.lyra_kv_heads}"
        )
    if k.shape[3] != spec.head_dim:
        raise InputError(f"static k and v have head_dim {k.shape[3]}; the spec has {spec.head_dim}")
    if k.shape[0] not in {1, batch}:
        raise InputError(f"static k and v have batch {k.shape[0]}; expected 1 (shared by all rows) or {batch}")
    shape = (k.shape[0], k.shape[2])
    if mask.shape != shape or mask.dtype != np.bool_:
        raise InputError(f"static mask has shape {mask.shape} and dtype {mask.dtype}; expected bool {shape}")
    if positions.shape != shape or not np.issubdtype(positions.dtype, np.integer):
        raise InputError(
            f"static positions has shape {positions.shape} and dtype {positions.dtype}; expected integers {shape}"
        )
    check_visible_finite("static k", k, mask)
    check_visible_finite("static v", v, mask)
    return StaticLayer(
        k.astype(np.float32, copy=False), v.astype(np.float32, copy=False), mask, positions.astype(np.int64, copy=False)
    )


def check_visible_finite(name: str, values: np.ndarray, mask: np.ndarray) -> None:
    """Refuse NaN and infinity where they would be seen: values [Bc,Hs,S,D], mask [Bc,S]. Raises InputError."""
    if np.isfinite(values).all():
        return
    bad = np.argwhere(~np.isfinite(values).all(axis=(1, 3)) & mask)
    if len(bad):
        row, slot = bad[0]
        raise InputError(
            f"{name} is not finite in {len(bad)} visible slots, the first at row {row}, token {slot}; "
            f"mask these slots or capture the context again"
        )
    raise InputError(f"{name} is not finite in masked slots; fill them with any finite value, for example 0")


def check_cotangent(cotangent: np.ndarray, inputs: CallInputs) -> np.ndarray:
    """The cotangent of an output [B,T,E] as float32, 0 at padding, whose output nobody specified. Raises InputError."""
    cotangent = np.asarray(cotangent)
    if cotangent.shape != inputs.x.shape or not np.issubdtype(cotangent.dtype, np.floating):
        raise InputError(
            f"cotangent has shape {cotangent.shape} and dtype {cotangent.dtype}; "
            f"expected float32 {inputs.x.shape}, the shape of the output"
        )
    return np.where(inputs.mask[:, :, None], cotangent, 0.0).astype(np.float32)


def check_dtype(dtype: str) -> Dtype:
    """The type that a layer is asked to compute in. Clause DTYPE-3. Raises InputError."""
    if not isinstance(dtype, str) or dtype not in get_args(Dtype):
        raise InputError(f"dtype is {shown(dtype)}; an attention layer computes in {listed(get_args(Dtype))}")
    return cast(Dtype, dtype)


def check_differentiable(dtype: Dtype) -> None:
    """Refuse gradients of a layer that does not compute in float32. Clause DTYPE-3. Raises InputError."""
    if dtype != "float32":
        raise InputError(f"a layer with dtype={dtype!r} has no gradients; make one with dtype='float32' for them")


class HasWeights(Protocol):
    """A spec that says which weights it needs: an AttentionSpec or a SequentialSpec."""

    def weight_shapes(self) -> dict[str, tuple[int, ...]]: ...


def check_weights(spec: HasWeights, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights the spec asks for, as float32; missing, unknown and misshapen ones are refused. Raises InputError."""
    shapes = spec.weight_shapes()
    missing, unknown = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    if missing or unknown:
        raise InputError(f"weights: missing {missing or 'none'}, not in the spec {unknown or 'none'}")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise InputError(f"weights[{name!r}] has shape {tuple(weights[name].shape)}; the spec says {shape}")
    return {name: forwards(np.asarray(weights[name], dtype=np.float32)) for name in shapes}
