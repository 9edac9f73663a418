"""A JAX model spread over eight virtual devices gives what it gives on one, and each device holds its part only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("transformers")

from tiny_gemma import make_model  # noqa: E402

import lyra  # noqa: E402
from lyra.errors import ModelError  # noqa: E402

SCRIPT = Path(__file__).with_name("sharded_model.py")
DEVICES = 8


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `sharded_model` prints of a model with four KV heads."""
    folder = tmp_path_factory.mktemp("spread")
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 64}
    layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "vocab_size": 96}
    make_model(**sizes, **layers).save_pretrained(folder)
    virtual = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    environment = {**os.environ, **virtual}
    command = [sys.executable, "-P", str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", ["both", "context"])
def test_results_are_those_of_one_device(report: dict[str, Any], mesh: str) -> None:
    """Logits, greedy tokens, loss, and the gradients of every parameter and of the static keys and values."""
    differences = report[mesh]["differences"]
    assert len(differences) > 25
    assert differences["tokens"] == 0
    assert {key: value for key, value in differences.items() if value > 1e-5} == {}


def test_a_device_holds_its_part(report: dict[str, Any]) -> None:
    """Memory falls by the devices of an axis; only norms, a few numbers a slot, stay whole."""
    (whole,), (context,), (cache,) = (report["none"]["sizes"][what] for what in ("parameters", "context", "cache"))
    both, slots = report["both"]["sizes"], report["context"]["sizes"]
    assert all(len(held) == DEVICES and len(set(held)) == 1 for held in (*both.values(), *slots.values()))
    assert both["parameters"][0] < 1.05 * whole / 4
    assert both["cache"][0] < 1.1 * cache / 4
    assert both["context"][0] < 1.05 * context / DEVICES
    assert slots["context"][0] < 1.05 * context / DEVICES
    assert slots["parameters"][0] == whole


def test_a_mesh_that_does_not_fit_is_refused(report: dict[str, Any]) -> None:
    heads, names = report["refused"]
    assert "spreads KV heads over 8 devices, and the model has 4" in heads
    assert "mesh has the axes ['model']; expected 'heads', 'context' or both" in names


def test_the_front_door_takes_a_mesh(tiny_folder: Path) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("heads",))
    model = lyra.load(tiny_folder, backend="jax", mesh=mesh)
    assert model.module.sharding.mesh.axis_names == ("heads",)
    with pytest.raises(ModelError, match="backend 'torch' takes no mesh; load with backend='jax'"):
        lyra.load(tiny_folder, backend="torch", mesh=mesh)
    with pytest.raises(lyra.InputError, match="device is 'cpu' and there is a mesh"):
        lyra.load(tiny_folder, backend="jax", mesh=mesh, device="cpu")


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 4096)])
def test_what_is_placed_is_a_copy(shape: tuple[int, ...]) -> None:
    """Where an array begins at a multiple of 64 bytes, JAX would otherwise read it where it lies."""
    from lyra.backends.jax_impl.sharding import ShardingConfig

    room = np.zeros(8192, np.float32)
    start = -(room.ctypes.data // room.itemsize) % 16
    given = room[start : start + 4096].reshape(shape)
    assert given.ctypes.data % 64 == 0
    placed = jax.block_until_ready(ShardingConfig.no_sharding().place_slots(given))
    given[:] = 1
    assert not np.asarray(placed).any()
