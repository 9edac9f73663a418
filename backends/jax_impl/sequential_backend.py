"""An injected block behind the protocol: one compiled function a call of a block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from jax import Array

from lyra.backends.protocol import Result
from lyra.spec.inputs import StaticLayer, check_block_call, check_own_cache, check_weights
from lyra.spec.sequential import SequentialSpec

from . import cache as live
from .attention_backend import JaxAttention
from .cache import LiveCache
from .dtype import to_device
from .layer import Call, Shape, layer_of, shape_of
from .sequential import BlockNumbers, block_numbers, block_of, reading_only, run_block
from .shapes import make_room, pad_slots
from .static import PlacedStatic, rotate_static


@partial(jax.jit, static_argnames=("shape", "own"))
def call_block(
    h: Array,
    positions: Array,
    mask: Array,
    weights: Mapping[str, Array],
    numbers: BlockNumbers,
    static: PlacedStatic | None,
    cache: LiveCache,
    *,
    shape: Shape,
    own: bool,
) -> tuple[Array, LiveCache | None, dict[str, Array]]:
    """A whole block call in one compiled function: output [B,T,E], cache, trace. Clause SEQUENTIAL.

    The cache must have room for the call's tokens; with `own` it holds them already, and no other one comes back.
    """
    rotated, trace = (
        None if static is None else rotate_static(static, numbers.attention.frequencies),
        dict[str, Array](),
    )
    layer = layer_of(weights, numbers.attention, shape)
    block = block_of(numbers, reading_only(layer) if own else layer, weights)
    output, after = run_block(h, block, Call(positions, mask, rotated, cache), trace)
    return output, None if own else after, trace


class JaxSequential:
    """One injected block in JAX: an `Attention` whose x is h. The weights move to the device here. SEQUENTIAL."""

    def __init__(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray]) -> None:
        """Raises InputError where the weights are not those of the spec."""
        self.spec = spec
        checked = check_weights(spec, weights)
        self._attention = JaxAttention(spec.attention, {name: checked[name] for name in spec.attention.weight_shapes()})
        self._shape = shape_of(spec.attention)
        make_room(to_device)
        self._weights: dict[str, Array]
        self._numbers: BlockNumbers
        self._weights, self._numbers = to_device((checked, block_numbers(spec)))
        self.reorder = self._attention.reorder
        self.crop = self._attention.crop

    def __call__(
        self,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
        cache: object | None = None,
        trace: bool = False,
    ) -> Result:
        """Run the block over h, x [B,T,E]; with source "own", `cache` is its layer's and holds these tokens already.

        Shapes as in the protocol; raises InputError.
        """
        given = check_block_call(self.spec, x, positions, mask, static, cache)
        tokens = given.mask.shape[1]
        inputs, past, placed = self._attention.prepare(given, cache)
        own = self.spec.source == "own"
        if own:
            check_own_cache(self.spec.attention, given, *past.contents())
        attention = self._numbers.attention
        make_room(call_block)
        output, cache_after, stages = call_block(
            inputs.x,
            inputs.positions.astype(np.int32),
            inputs.mask,
            self._weights,
            self._numbers._replace(attention=attention if placed is not None else attention._replace(heads=None)),
            None if placed is None else pad_slots(placed),
            past if own else live.with_room(past, inputs.mask.shape[1]),
            shape=self._shape,
            own=own,
        )
        after = past if cache_after is None else cache_after._replace(length=past.length + tokens)
        names = self.spec.trace_names() if trace else ()
        return Result(
            np.asarray(output)[:, :tokens], after, {name: np.asarray(stages[name])[:, :tokens] for name in names}
        )
