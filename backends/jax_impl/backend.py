"""The JAX backend: attention layers, injected blocks and whole models, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import numpy as np

from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError
from lyra.spec.sequential import SequentialSpec

from .attention_backend import JaxAttention
from .dtype import to_device
from .sequential_backend import JaxSequential

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from .model import JaxEngine


class JaxBackend:
    """Attention layers, injected blocks and whole Gemma-3 models in JAX (`SequentialBackend` and `ModelBackend`)."""

    name = "jax"
    capabilities = frozenset(
        {"static", "cache", "trace", "reorder", "crop", "grad", "sequential", "bfloat16", "mesh", "inject", "blends"}
    )

    @property
    def hardware(self) -> str:
        """What it computes on (protocol `PlacedBackend`): JAX's default device."""
        (device,) = to_device(np.zeros(())).devices()
        return "CPU" if device.platform == "cpu" else str(device.device_kind)

    def attention(
        self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], *, dtype: str = "float32"
    ) -> JaxAttention:
        """One attention layer. `weights` carry Hugging Face names and layouts. Clause DTYPE. Raises InputError."""
        return JaxAttention(spec, weights, dtype)

    def sequential(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray]) -> JaxSequential:
        """One injected block with its weights (names as in `spec.weight_shapes()`). Raises InputError."""
        return JaxSequential(spec, weights)

    def load(
        self, folder: str, *, dtype: str = "float32", device: str | None = None, mesh: Mesh | None = None
    ) -> JaxEngine:
        """A whole Gemma-3 from a folder in Hugging Face's layout; raises and options as in `JaxEngine.load`."""
        from .model import JaxEngine  # here, because it imports flax, which the attention level does not need

        return JaxEngine.load(folder, dtype=dtype, device=device, mesh=mesh)

    def mesh(self, axes: Mapping[str, int]) -> Mesh:
        """A mesh of JAX's first devices with these axes and sizes. Raises InputError where there are fewer devices."""
        devices, wanted = jax.devices(), math.prod(axes.values())
        if len(devices) < wanted:
            raise InputError(
                f"a mesh {dict(axes)} needs {wanted} devices, and JAX sees {len(devices)}; a processor counts as "
                f"several in a process that starts with {self.environment(wanted)}"
            )
        return jax.sharding.Mesh(np.array(devices[:wanted]).reshape(tuple(axes.values())), tuple(axes))

    def environment(self, devices: int) -> dict[str, str]:
        """The environment variables with which JAX takes the processor for so many devices."""
        return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
