"""Damaged context files: refused in a line or loaded as what was saved; beside a process that replaces them; older."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small_contexts import assert_same, make_context

from lyra.cli import application
from lyra.spec import ContextError, StaticContext, UncheckedContextWarning
from lyra.spec import context_file as module

pytest.importorskip("resource", reason="limits of time and memory are those of POSIX")

from context_damage import outcomes
from context_damage_kinds import KINDS, older, put_together, resealed, taken_apart

TESTS = str(Path(__file__).parent)


# a thousand of them


def test_no_damaged_file_is_another_context_or_anything_but_refused(tmp_path: Path) -> None:
    found = outcomes(1000, 0, tmp_path)
    faults = [one for one in found if one.verdict not in {"same", "refused", "loads"}]
    assert not faults, faults[:3]
    assert {one.kind for one in found if one.verdict == "refused"} == {kind.__name__ for kind in KINDS}
    counts = Counter((one.state, one.verdict) for one in found)
    assert counts["sealed", "refused"] > 500
    assert counts["sealed", "same"] > 10  # the header written otherwise, for example


def test_without_the_digests_damage_is_another_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer finds what it is for: with either digest unread, contexts load as others than were saved."""
    for check in ("check_header", "check_tensors"):
        with monkeypatch.context() as patch:
            patch.setattr(module, check, lambda _: None)
            assert any(outcome.verdict == "wrong" for outcome in outcomes(600, 0, tmp_path)), check


DRAWN = f"""
import sys
sys.path.insert(0, {TESTS!r})
from hashlib import sha256
from context_damage import damaged_files
print(sha256(b"".join(file for *_, file in damaged_files(200, 3))).hexdigest())
"""


def test_a_seed_draws_the_same_files_in_every_process() -> None:
    """What a fuzzer finds is found again: strings hash otherwise in each process, and decide nothing."""
    command = [sys.executable, "-c", DRAWN]
    drawn = {
        subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in "12"
    }
    assert len(drawn) == 1


# some of them by hand


def damaged(path: Path, change: str) -> bytes:
    """The file of a context with one thing of equal shape in another's place, or one value changed."""
    header, data = taken_apart(path.read_bytes())
    metadata = header["__metadata__"]
    match change:
        case "k and v":
            header["layers.1.k"], header["layers.1.v"] = header["layers.1.v"], header["layers.1.k"]
        case "layers":
            header["layers.1.k"], header["layers.3.k"] = header["layers.3.k"], header["layers.1.k"]
        case "scales":
            header["layers.1.v.scales"], header["layers.3.v.scales"] = (
                header["layers.3.v.scales"], header["layers.1.v.scales"],
            )  # fmt: skip
        case "mask" | "layers.1.v.blocks" | "tokens":
            begin = header[change]["data_offsets"][0]
            data = data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :]
        case "heads":
            metadata["kv_heads"] = metadata["kv_heads"].replace("[1, 3]", "[0, 3]", 1)
        case "model":
            metadata["fingerprint"] = metadata["fingerprint"].replace('"small"', '"large"')
        case "older":
            metadata["version"] = "1"
    return put_together(header, data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("k and v", r"2 of 17 tensors are damaged, the first being 'layers\.1\.k'"),
        ("layers", "2 of 17 tensors are damaged"),
        ("scales", r"2 of 17 tensors are damaged, the first being 'layers\.1\.v\.scales'"),
        ("mask", "1 of 17 tensors are damaged, the first being 'mask'"),
        ("layers.1.v.blocks", "1 of 17 tensors are damaged"),
        ("tokens", "1 of 17 tensors are damaged"),
        ("heads", "its header is damaged: its digest is .*take another copy or capture the context again"),
        ("model", "its header is damaged"),
        ("older", "it has digests, which no file of format version '1' has"),
    ],
)
def test_damage_is_named_and_may_be_looked_at(tmp_path: Path, change: str, message: str) -> None:
    path, context = tmp_path / "book.safetensors", make_context().astype("int8")
    context.save(path)
    path.write_bytes(damaged(path, change))
    with pytest.raises(ContextError, match=message) as refusal:
        StaticContext.load(path)
    assert str(refusal.value).startswith(f"{path}: ")
    if change != "older":
        assert StaticContext.load(path, verify=False).num_tokens in {5, 6}


def test_a_page_of_zeros_anywhere_in_the_values_is_found(tmp_path: Path) -> None:
    path = tmp_path / "book.safetensors"
    make_context(64).save(path)
    whole = path.read_bytes()
    for at in range(len(whole) - 32_768, len(whole) - 512, 4096):
        path.write_bytes(whole[:at] + bytes(512) + whole[at + 512 :])
        with pytest.raises(ContextError, match="tensors are damaged"):
            StaticContext.load(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = {"pipe": tmp_path / "pipe", "folder": tmp_path, "device": Path("/dev/zero")}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ContextError, match=r"it is no regular file|it cannot be read"):
        StaticContext.load(path)


@pytest.mark.parametrize("rows", [10**12, 2**63])
def test_sizes_are_held_to_the_file_before_anything_is_made_of_them(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "huge.safetensors"
    make_context(0).save(path)
    header, _ = taken_apart(path.read_bytes())
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"][0] = rows
    path.write_bytes(resealed(put_together(header, b"")))
    with pytest.raises(ContextError, match=rf"has shape \[{rows}, .*\] in 0 bytes"):
        StaticContext.load(path)


# older files


def test_an_older_file_loads_with_a_notice(tmp_path: Path) -> None:
    path, context = tmp_path / "old.safetensors", make_context()
    context.save(path)
    path.write_bytes(older(path.read_bytes()))
    with pytest.warns(UncheckedContextWarning, match="older than digests.*save the context again") as notices:
        loaded = StaticContext.load(path)
    assert notices[0].filename == __file__
    assert_same(loaded, context)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(StaticContext.load(path, verify=False), context)
        loaded.save(path)
        assert_same(StaticContext.load(path), context)


# files that are replaced while they are read

REPLACING = f"""
import os, sys
sys.path.insert(0, {TESTS!r})
from dataclasses import replace
from small_contexts import make_context, make_fingerprint
contexts = [
    replace(make_context(length, seed=length), fingerprint=make_fingerprint(model=str(length))) for length in (3, 40)
]
print("ready", flush=True)
while os.getppid() == int(sys.argv[2]):
    for context in contexts:
        context.save(sys.argv[1])
"""


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a mapped file cannot be replaced")
def test_a_file_that_is_replaced_meanwhile_is_one_file(tmp_path: Path) -> None:
    path = tmp_path / "book.safetensors"
    make_context(3, seed=3).save(path)
    command = [sys.executable, "-c", REPLACING, path, str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            while StaticContext.load(path).fingerprint.model == "small":
                pass
            seen = Counter[tuple[str, int]]()
            for _ in range(10_000):
                loaded = StaticContext.load(path)
                seen[loaded.fingerprint.model, loaded.num_tokens] += 1
                np.testing.assert_array_equal(loaded.positions[0], np.arange(loaded.num_tokens))
                if min(seen["3", 3], seen["40", 40]) > 300:
                    break
        finally:
            process.kill()
    assert set(seen) == {("3", 3), ("40", 40)}


# at the terminal


def test_inspect_tells_the_digest_and_refuses_damage(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    path = tmp_path / "book.safetensors"
    make_context().save(path)
    digest = taken_apart(path.read_bytes()).header["__metadata__"]["digest"]

    def inspected(*options: str) -> tuple[int, str]:
        done = CliRunner().invoke(application(), ["inspect", str(path), *options])
        return done.exit_code, done.output

    code, output = inspected()
    assert (code, f"{digest}, as saved" in output) == (0, True)
    assert json.loads(inspected("--json", "-")[1])["digest"] == {"xxh3_128": digest, "checked": True}
    path.write_bytes(damaged(path, "k and v"))
    code, output = inspected()
    assert (code, "2 of 9 tensors are damaged" in output, "Traceback" in output) == (2, True, False)
    code, output = inspected("--no-verify")
    assert (code, f"{digest}, not checked" in output) == (0, True)
    make_context().save(path)
    path.write_bytes(older(path.read_bytes()))
    code, output = inspected()
    assert (code, "none: the file is older than digests" in output) == (0, True)


def test_commands_tell_of_an_older_file_in_a_line(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    import lyra

    monkeypatch.setenv("LYRA_MODEL", str(tiny_folder))
    monkeypatch.chdir(tmp_path)
    path = Path("book.safetensors")
    lyra.load(tiny_folder).capture(np.arange(2, 12)).save(path)
    path.write_bytes(older(path.read_bytes()))
    done = CliRunner().invoke(application(), ["generate", "the hand", "--context", str(path), "-n", "1"])
    assert done.exit_code == 0, done.output
    notices = [line for line in done.stderr.splitlines() if "older" in line]
    assert notices == [
        "warning: book.safetensors: the file is older than digests, so that damage to it would not show; save the "
        "context again to give it one"
    ]
