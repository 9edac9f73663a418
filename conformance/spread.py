"""A whole model over a mesh of devices (clause MESH): here, where this process has so many, else in a new one.

A framework decides when it starts how many devices a processor counts as. So a backend says with what environment a
process has several, and this module is what such a process runs; a fault that is in the backend here is put in there.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np

from lyra.backends.protocol import Backend, MeshBackend, get_backend
from lyra.conformance.faults.catalogue import Fault
from lyra.conformance.faults.inject import fault_in, injected
from lyra.spec.attention import StaticSpec
from lyra.spec.errors import InputError
from lyra.spec.files import write_atomically
from lyra.spec.inputs import StaticLayer
from lyra.spec.split import HeadSplit

Answers = dict[str, np.ndarray]
LIMIT = 240
"""Seconds that a process of its own may take."""


@dataclass(frozen=True)
class Job:
    """What a model of `folder` over a mesh is asked.

    axes      the mesh: devices along each axis
    ids       [B,T], scored and continued by `new` tokens behind the contexts `static` of the layers, by `splits`
    captured  [1,S], from which the layers' keys and values are captured
    refused   meshes that no model of the folder can be spread over
    """

    folder: str
    axes: dict[str, int]
    ids: np.ndarray
    new: int
    captured: np.ndarray
    static: dict[int, StaticLayer]
    splits: dict[int, HeadSplit]
    refused: tuple[dict[str, int], ...] = ()

    def to_file(self, path: Path) -> None:
        """Everything but the arrays is text in an array."""
        arrays = {"ids": self.ids, "captured": self.captured}
        for layer, static in self.static.items():
            arrays |= {f"{name} {layer}": part for name, part in static._asdict().items()}
        splits = {layer: split.lyra_q_heads for layer, split in self.splits.items()}
        rest = {"folder": self.folder, "axes": self.axes, "new": self.new, "splits": splits, "refused": self.refused}
        np.savez(path, rest=np.array(json.dumps(rest)), allow_pickle=False, **arrays)

    @classmethod
    def from_file(cls, path: Path) -> Job:
        """The job that a file holds."""
        with np.load(path, allow_pickle=False) as found:
            rest = json.loads(str(found["rest"]))
            heads = {int(layer): tuple(some) for layer, some in rest.pop("splits").items()}
            static = {
                layer: StaticLayer(*(found[f"{name} {layer}"] for name in StaticLayer._fields)) for layer in heads
            }
            splits = {layer: HeadSplit(lyra_q_heads=some, share_kv=True) for layer, some in heads.items()}
            refused = tuple(rest.pop("refused"))
            return cls(
                ids=found["ids"], captured=found["captured"], static=static, splits=splits, refused=refused, **rest
            )


def over_devices(backend: Backend, job: Job) -> Answers:
    """What a backend answers to a job. Raises what it raises, and RuntimeError for what ends a process of its own."""
    spreading = cast(MeshBackend, backend)
    try:
        for axes in (job.axes, *job.refused):
            spreading.mesh(axes)
    except InputError:
        return _elsewhere(spreading, job)
    return ask(spreading, job)


def ask(backend: MeshBackend, job: Job) -> Answers:
    """The same, in a process that has the devices: logits, tokens, captured keys and values, and words of refusal."""
    loaded = backend.load(job.folder, mesh=backend.mesh(job.axes))
    found: Answers = {}
    for layer, captured in loaded.capture(job.captured, tuple(job.static)).items():
        found |= {f"keys of layer {layer}": captured.k, f"values of layer {layer}": captured.v}
    loaded.attach(job.static, job.splits, StaticSpec())
    found |= {"logits": loaded.logits(job.ids), "tokens": loaded.generate(job.ids, max_new_tokens=job.new)}
    for number, axes in enumerate(job.refused):
        found[f"refused {number}"] = np.array(_refusal(backend, job.folder, axes))
    return found


def _refusal(backend: MeshBackend, folder: str, axes: dict[str, int]) -> str:
    """What a backend says of a mesh that it must refuse; nothing where it takes it."""
    mesh = backend.mesh(axes)
    try:
        backend.load(folder, mesh=mesh)
    except InputError as error:
        return str(error)
    return ""


def _elsewhere(backend: MeshBackend, job: Job) -> Answers:
    """The same in a process with as many devices as the largest mesh needs."""
    devices = max(int(np.prod(list(axes.values()))) for axes in (job.axes, *job.refused))
    fault = fault_in(backend)
    made = type(backend)
    order = {
        "backend": backend.name if fault else f"{made.__module__}:{made.__qualname__}",
        "fault": fault.model_dump(mode="json") if fault else None,
    }
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": paths, **backend.environment(devices)}
    with TemporaryDirectory(prefix="lyra-mesh-") as folder:
        job_path, answers_path = Path(folder) / "job.npz", Path(folder) / "answers.npz"
        job.to_file(job_path)
        command = [sys.executable, "-P", "-m", __name__, json.dumps(order), str(job_path), str(answers_path)]
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", timeout=LIMIT, check=False
        )
        if not answers_path.is_file():
            said = done.stderr.strip().splitlines()
            raise RuntimeError(f"over {devices} devices: {said[-1] if said else f'exit status {done.returncode}'}")
        with np.load(answers_path, allow_pickle=False) as found:
            return dict(found)


def main(order: str, job_path: str, answers_path: str) -> None:
    """Do what `_elsewhere` ordered: make the backend, with its fault, and write what it answers to a job."""
    wanted = json.loads(order)
    name, fault = wanted["backend"], wanted["fault"]
    with injected(Fault.model_validate(fault), name) if fault else nullcontext(get_backend(name)) as backend:
        found = ask(cast(MeshBackend, backend), Job.from_file(Path(job_path)))
    whole = io.BytesIO()
    np.savez(whole, allow_pickle=False, **{key: np.asarray(value) for key, value in found.items()})
    write_atomically(Path(answers_path), whole.getvalue())


if __name__ == "__main__":
    main(*sys.argv[1:])
