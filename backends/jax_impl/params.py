"""From a checked folder to a model: every weight of the checkpoint to its place in the module."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lyra.backends.checkpoint import Checkpoint
from lyra.spec.families.family import MODEL

from .decoder import Decoder
from .sharding import ShardingConfig


def load_model(
    checkpoint: Checkpoint, dtype: np.dtype[Any], device: jax.Device | None = None, mesh: Mesh | None = None
) -> Decoder:
    """The model of a checked folder, in `dtype`, on `device` (JAX's default) or `mesh`.

    Raises InputError for a mesh that does not fit, and CheckpointError for weights that are not finite.
    """
    spec = checkpoint.spec
    sharding = ShardingConfig.no_sharding() if mesh is None else ShardingConfig.over(mesh, spec)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(spec, sharding, rngs=nnx.Rngs(0))))
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    for name, array in checkpoint.arrays():
        target = module_path(name)
        path, leaf = flat[target]
        place = sharding.parameter(target, leaf.shape) or device
        flat[target] = (path, leaf.replace(jax.device_put(own_copy(array, dtype), place)))
    return nnx.merge(graph, nnx.from_flat_state(list(flat.values())))


def module_path(name: str) -> str:
    """Where a weight belongs in the module, by Hugging Face's name: the decoder is the module itself."""
    return name.removeprefix(MODEL)


def own_copy(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """The values in `dtype`, in memory of their own: JAX would read an aligned array where it lies, in the file."""
    return np.array(array, dtype)
