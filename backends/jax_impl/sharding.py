"""A model spread over a mesh of devices: KV heads on the axis "heads", slots of static contexts on the axis "context".

The weights and the live cache are only placed; XLA sees to what follows. Static slots are attended to where they lie,
and the Partials are merged over the devices by max and sum, as two halves of a context are on one (clause STATIC-4).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec

from .dtype import to_device
from .partial import Partial, finite_maximum

HEADS, CONTEXT = "heads", "context"
AXES: tuple[tuple[str, P], ...] = (
    (r".*\.self_attn\.[qkv]_proj\.weight", P(HEADS, None)),
    (r".*\.self_attn\.[qkv]_proj\.bias", P(HEADS)),
    (r".*\.self_attn\.o_proj\.weight", P(None, HEADS)),
    (r".*\.mlp\.(?:gate|up)_proj\.weight", P(HEADS, None)),
    (r".*\.mlp\.down_proj\.weight", P(None, HEADS)),
    (r"(?:embed_tokens|lm_head)\.weight", P(HEADS, None)),
)
"""The axes of parameters that are spread, by the module's paths; the others are on every device in full."""

Attend = Callable[[Array, Array, Array, Array | None, Array, Array | None], Partial]


@dataclass(frozen=True)
class ShardingConfig:
    """Where a model's arrays lie. `mesh` None is one device; an axis that the mesh does not have spreads nothing."""

    mesh: Mesh | None = None

    @classmethod
    def no_sharding(cls) -> Self:
        """Everything on one device."""
        return cls()

    @classmethod
    def over(cls, mesh: Mesh, spec: ModelSpec) -> Self:
        """The arrays of a model over a mesh with the axes "heads", "context" or both. Raises InputError."""
        unknown = sorted(set(mesh.axis_names) - {HEADS, CONTEXT})
        if unknown:
            raise InputError(f"mesh has the axes {unknown}; expected {HEADS!r}, {CONTEXT!r} or both")
        made = cls(Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim))
        if spec.num_key_value_heads % made.size(HEADS):
            raise InputError(
                f"mesh spreads KV heads over {made.size(HEADS)} devices, and the model has {spec.num_key_value_heads}; "
                f"give the axis {HEADS!r} a size that divides them"
            )
        return made

    def size(self, axis: str) -> int:
        """Devices along an axis; 1 where there is no such axis."""
        return 1 if self.mesh is None else dict(self.mesh.shape).get(axis, 1)

    def parameter(self, path: str, shape: tuple[int, ...]) -> NamedSharding | None:
        """Where the parameter of a path lies; an axis whose length the devices do not divide stays whole."""
        spec = next((spec for pattern, spec in AXES if re.fullmatch(pattern, path)), P())
        return self._named(spec, shape)

    def place_cache(self, cache: Any) -> Any:
        """An empty cache on its devices: keys and values (4 axes, the heads second) by KV head, the rest everywhere."""
        if self.mesh is None:
            return to_device(cache)  # one call for all of its arrays

        def place(part: Any) -> Array:
            axes = P(None, HEADS) if jnp.ndim(part) == 4 else P()
            return jax.device_put(part, self._named(axes, jnp.shape(part)))

        return jax.tree.map(place, cache)

    def place_slots(self, part: np.ndarray | Array) -> Array:
        """A copy of static k or v [Bc,Hs,S,D], positions or mask [Bc,S] on its devices, some slots on each.

        JAX would read an aligned NumPy array where it lies, whatever `may_alias` says, and see its later changes.
        """
        axes = P(None, HEADS, CONTEXT) if part.ndim == 4 else P(None, CONTEXT)
        return jax.device_put(np.array(part), self._named(axes, part.shape))

    def attend_slots(self, attend: Attend) -> Attend:
        """Attention to static slots [...,S] where they lie, merged over the devices; itself without such an axis."""
        if self.size(CONTEXT) == 1:
            return attend

        def on_each(
            query: Array, keys: Array, values: Array, visible: Array | None, scale: Array, softcap: Array | None
        ) -> Partial:
            return merge_over(attend(query, keys, values, visible, scale, softcap), CONTEXT)

        slots_last, shown = P(None, None, None, CONTEXT), P(None, None, None, None, CONTEXT)
        return jax.shard_map(
            on_each,
            mesh=self.mesh,
            in_specs=(P(), slots_last, slots_last, shown, P(), P()),
            out_specs=P(),
            axis_names={CONTEXT},
        )

    def _named(self, spec: P, shape: tuple[int, ...]) -> NamedSharding | None:
        if self.mesh is None:
            return None
        fitting = [
            axis if axis is not None and axis in self.mesh.axis_names and length % self.size(axis) == 0 else None
            for axis, length in zip(spec, shape, strict=False)
        ]
        return NamedSharding(self.mesh, P(*fitting))


ONE_DEVICE = ShardingConfig.no_sharding()


def merge_over(part: Partial, axis: str) -> Partial:
    """The Partial over the keys of all devices along a mesh axis, the same on each: one max, then one sum.

    Clauses STATIC-1, GRAD.
    """
    maximum = lax.pmax(lax.stop_gradient(part.maximum), axis)
    weight = jnp.exp(part.maximum - finite_maximum(maximum))
    out, total = lax.psum((part.out * weight, part.total * weight), axis)
    return Partial(out, maximum, total)
