"""Damaged and odd models: refused in one line that names file and field, or loaded as what they are."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from model_damage import damaged_folder, damaged_gguf

import lyra
from lyra.backends.checkpoint import open_checkpoint
from lyra.checkpoint import check_folder, resolve
from lyra.errors import CheckpointError
from lyra.gguf_file import GGUFFile
from lyra.spec import ModelSpec
from lyra.text import Text

FOLDERS, FILES = 300, 120


def refusal_of(folder: Path) -> str | None:
    """What the front door says of a folder, up to its weights; None where it is a model."""
    try:
        checkpoint = open_checkpoint(check_folder(folder))
        Text.from_folder(folder)
        for _ in checkpoint.arrays():
            pass
    except CheckpointError as error:
        return str(error)
    return None


def check_loaded(folder: Path, spec: ModelSpec, whole: dict[str, np.ndarray]) -> None:
    """Both backends have the model that the config describes, with the file's weights."""
    for backend in ("torch", "jax"):
        pytest.importorskip(backend)
        engine = lyra.load(folder, backend=backend).engine
        assert engine.spec == spec
        for name, values in engine.attention_weights(1).items():
            np.testing.assert_array_equal(values, whole[f"model.layers.1.self_attn.{name}"])


def test_damaged_folders_are_refused_in_a_line_or_load_as_they_are(tiny_folder: Path, tmp_path: Path) -> None:
    whole = dict(open_checkpoint(tiny_folder).arrays())
    outcomes: Counter[str] = Counter()
    specs: set[ModelSpec] = set()
    for case in range(FOLDERS):
        folder = tmp_path / f"case{case}"
        what = damaged_folder(tiny_folder, folder, case)
        refusal = refusal_of(folder)
        if refusal is None:
            outcomes["loaded"] += 1
            found = dict(open_checkpoint(folder).arrays())
            assert found.keys() == whole.keys(), what
            for name, values in found.items():
                assert np.isfinite(values).all(), what
                assert values.shape == whole[name].shape, what
            spec = open_checkpoint(folder).spec
            if spec not in specs:
                specs.add(spec)
                check_loaded(folder, spec, whole)
        else:
            outcomes["refused"] += 1
            assert "\n" not in refusal, (what, refusal)
            assert str(folder) in refusal, (what, refusal)
            assert len(refusal) < 600, (what, refusal)
        shutil.rmtree(folder)
    assert outcomes["refused"] > FOLDERS // 2, "the cases are damaged ones"
    assert outcomes["loaded"] > FOLDERS // 10, "and harmless ones"


def test_damaged_gguf_files_are_refused_in_a_line_or_convert(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what does not load is not kept."""
    monkeypatch.setenv("LYRA_CACHE", str(tmp_path / "cache"))
    source = tiny_gguf.read_bytes()
    header = min(info.offset for info in GGUFFile(tiny_gguf).tensors.values())
    outcomes: Counter[str] = Counter()
    for case in range(FILES):
        path = tmp_path / f"case{case}.gguf"
        data, what = damaged_gguf(source, header, case)
        path.write_bytes(data)
        refusal, folder = None, None
        with contextlib.redirect_stderr(None):
            try:
                folder = resolve(path)
            except CheckpointError as error:
                refusal = str(error)
        cached = list((tmp_path / "cache" / "checkpoints").glob("*"))
        if refusal is None:
            assert folder is not None
            outcomes["converted"] += 1
            assert refusal_of(folder) is None, what
            assert cached == [folder], what
            shutil.rmtree(folder)
        else:
            outcomes["refused"] += 1
            assert "\n" not in refusal, (what, refusal)
            assert str(path) in refusal, (what, refusal)
            assert len(refusal) < 600, (what, refusal)
            assert cached == [], what
        path.unlink()
    assert outcomes["refused"] > FILES // 3, "the cases are damaged ones"
