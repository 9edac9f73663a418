"""Run by test_jax_sharding in a process with eight devices: a model on one of them and spread over all, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lyra.backends.jax_impl import JaxBackend, tuning
from lyra.backends.jax_impl.forward import open_cache, split_module
from lyra.backends.jax_impl.model import JaxEngine
from lyra.spec import HeadSplit, InputError, StaticSpec
from lyra.spec.inputs import StaticLayer

SLOTS, LIVE, NEW = 24, 11, 4
MESHES = {"both": {"heads": 4, "context": 2}, "context": {"context": 8}}


def per_device(tree: Any) -> list[int]:
    """The bytes of a tree's arrays on each of the devices that hold any."""
    held: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return [held[device] for device in sorted(held)]


def run(engine: JaxEngine) -> tuple[dict[str, list[int]], dict[str, np.ndarray]]:
    """What lies where, and what the model gives with a context: logits, tokens, loss and gradients."""
    rng, ids = np.random.default_rng(0), np.arange(2 * LIVE).reshape(2, LIVE) % 90
    layer = engine.spec.global_layers[0]
    splits = {layer: HeadSplit((1, 2, 3, 4, 5, 7), share_kv=True)}
    mask = np.ones((1, SLOTS), bool)
    mask[0, [2, 21]] = False
    k, v = rng.normal(size=(2, 1, 4, SLOTS, 8)).astype(np.float32)
    static = {layer: StaticLayer(k, v, mask, np.arange(SLOTS)[None])}
    engine.attach(static, splits, StaticSpec())
    graph = split_module(engine.module)
    context, settings = tuning.tunable(engine.spec, static, splits, sharding=engine.module.sharding)
    derive = jax.jit(jax.value_and_grad(tuning.mean_nll, argnums=(1, 4)), static_argnums=0)
    real = np.ones(ids.shape, bool)
    loss, gradients = derive(graph.structure, graph.state, ids.astype(np.int32), real, context, settings)
    sizes = {
        "parameters": per_device(graph.state),
        "context": per_device(engine._attached[layer].static),
        "cache": per_device(open_cache(graph, 2, LIVE)),
    }
    values = {"logits": engine.logits(ids), "loss": np.asarray(loss)}
    values["tokens"] = engine.generate(ids, max_new_tokens=NEW)
    values |= {f"gradient {number}": np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(gradients))}
    return sizes, values


def spread(axes: dict[str, int]) -> Mesh:
    """All devices as a mesh."""
    return Mesh(np.array(jax.devices()).reshape(tuple(axes.values())), tuple(axes))


def refusal(folder: str, axes: dict[str, int]) -> str:
    """What loading over a mesh that does not fit says."""
    try:
        JaxBackend().load(folder, mesh=spread(axes))
    except InputError as error:
        return str(error)
    return "loaded"


def main(folder: str) -> None:
    """Print, by mesh, the bytes on each device, and the largest difference over the largest value, of every result."""
    sizes, expected = run(JaxBackend().load(folder))
    report: dict[str, Any] = {"none": {"sizes": sizes}}
    for name, axes in MESHES.items():
        sizes, found = run(JaxBackend().load(folder, mesh=spread(axes)))
        differences = {
            key: float(np.abs(found[key] - value).max() / np.abs(value).max()) for key, value in expected.items()
        }
        report[name] = {"sizes": sizes, "differences": differences}
    report["refused"] = [refusal(folder, {"heads": 8}), refusal(folder, {"heads": 4, "model": 2})]
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
