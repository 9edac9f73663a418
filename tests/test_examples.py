"""The examples do what they say."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lyra
from lyra.backends.protocol import get_backend
from lyra.conformance.launch import make_session
from lyra.conformance.runner import run
from lyra.conformance.session import PROFILES

EXAMPLES = Path(__file__).parents[1] / "examples"


def call(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with arguments in a folder of its own."""
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-P", *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_numpy_backend_conforms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(PROFILES, "smoke", dataclasses.replace(PROFILES["smoke"], data=1))
    session = make_session(["numpy_backend:NumpyBackend"], profile="smoke", seed=0, spec=None)
    outcome = run(session, only="oracle or call or context or head or window or decode")
    assert outcome.exit_code == 0, outcome.log
    assert session.record.ok
    assert session.record.cases > 300


def test_the_numpy_backend_is_as_short_as_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert get_backend("numpy_backend:NumpyBackend").capabilities >= {"static", "cache", "trace", "reorder", "crop"}
    assert len((EXAMPLES / "numpy_backend.py").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_split_tests_pass_as_a_file_of_a_users_own(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    copy = tmp_path / "test_my_split.py"
    copy.write_bytes((EXAMPLES / "pytest_your_split.py").read_bytes())
    done = call("-m", "pytest", "-q", "-p", "no:cacheprovider", copy, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_one_context_serves_two_backends(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("jax")
    spec = lyra.load(tiny_folder).spec
    chosen = {1: lyra.HeadSplit((0, 3), share_kv=True), 3: lyra.HeadSplit((1,), share_kv=True)}
    spec.with_split(chosen).to_toml(tmp_path / "split.toml")
    options = ["--from", "torch", "--to", "jax", "--tokens", "4500", "--model", tiny_folder, "--split", "split.toml"]
    done = call(EXAMPLES / "two_backends.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch and jax generate the same text with the context." in done.stdout
    assert "3 of 8 in the global layers: 0, 3 of layer 1; 1 of layer 3" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["split.toml"]


def test_a_document_cut_too_short_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    done = call(EXAMPLES / "two_backends.py", "--tokens", "20", "--model", tiny_folder, cwd=tmp_path)
    assert done.returncode == 2
    assert "tokens, got 20" in done.stderr


@pytest.mark.parametrize(
    ("script", "backend", "needs"), [("tune_context.py", "torch", "torch"), ("tune_context_jax.py", "jax", "optax")]
)
def test_a_tuned_context_is_saved_and_serves(
    script: str, backend: str, needs: str, tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip(needs)
    options = ["--model", tiny_folder, "--tokens", "24", "--slots", "6", "--steps", "2", "--out", "tuned.safetensors"]
    done = call(EXAMPLES / script, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(r"gives (\d+\.\d+) nats", done.stdout)
    assert said is not None
    assert f"2 │ {said[1]}" in re.sub(r" +", " ", done.stdout)
    context = lyra.StaticContext.load(tmp_path / "tuned.safetensors")
    assert (context.num_tokens, context.tokens) == (6, None)
    model = lyra.load(tiny_folder, backend=backend, context=context)
    assert model.generate("the", 2) != ""


def test_one_prompt_four_ways(tiny_folder: Path, tmp_path: Path) -> None:
    done = call(EXAMPLES / "inference.py", "--tokens", "2000", "--model", tiny_folder, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for way in ("plain", "full prompt", "Lyra, parallel, 4 heads", "Lyra, sequential, gate 0.25"):
        assert f"│ {way} " in done.stdout
    too_short = call(EXAMPLES / "inference.py", "--tokens", "20", "--model", tiny_folder, cwd=tmp_path)
    assert too_short.returncode == 2
    assert "tokens, got 20" in too_short.stderr
