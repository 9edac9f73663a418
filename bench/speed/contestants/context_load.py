"""What its digests add to loading a context's file: a file of a GiB, in the page cache."""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path

import numpy as np

from lyra.spec.context import ContextLayer, StaticContext
from lyra.spec.digest import check_tensors
from lyra.spec.fingerprint import Fingerprint
from lyra.spec.model import ModelSpec
from lyra.spec.tensor_file import open_tensors

from ..row import Work

HEADS = (4, 5, 6, 7)
MODEL = "gemma-3-12b"


def load(slots: int, verify: bool) -> Work:
    """Load the file, held to its digests or not."""
    return Work(partial(StaticContext.load, context_file(slots), verify=verify))


def load_and_hash(slots: int) -> Work:
    """Load the file unchecked, then map it anew and form the digests of all tensors: the hash's own time."""
    path = context_file(slots)

    def run() -> None:
        StaticContext.load(path, verify=False)
        check_tensors(open_tensors(path))

    return Work(run)


@cache
def context_file(slots: int) -> Path:
    """A random context of the 12B's global layers and four of its KV heads, in a folder that goes with the worker."""
    spec = ModelSpec.preset(MODEL)
    draw = np.random.default_rng(0)
    shape = (1, len(HEADS), slots, spec.attention.head_dim)
    layers = {
        layer: ContextLayer(HEADS, draw.standard_normal(shape, np.float32), draw.standard_normal(shape, np.float32))
        for layer in spec.global_layers
    }
    mark = Fingerprint.of(spec, dict.fromkeys(spec.global_layers, "random"))
    path = Path(_folder().name) / f"{slots}.safetensors"
    StaticContext(layers, np.ones((1, slots), dtype=bool), np.arange(slots)[None], mark).save(path)
    return path


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="lyra-bench-")
