"""How files are written: whole or not at all, for the eyes of the old file, with nothing left behind."""

from __future__ import annotations

import ast
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_contexts import assert_same, make_context

from lyra.spec import StaticContext
from lyra.spec.files import folder_renamed_into, renamed_into, write_atomically

ROOT = Path(__file__).parents[1]
TESTS = str(Path(__file__).parent)
posix = pytest.mark.skipif(os.name != "posix", reason="modes, signals and limits are those of POSIX")


@pytest.fixture
def umask() -> Iterator[None]:
    """The umask of the test is its own."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# whose eyes


@posix
@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_a_new_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, umask: None, mask: int, expected: int) -> None:
    os.umask(mask)
    write_atomically(tmp_path / "spec.json", b"{}")
    make_context().save(tmp_path / "c.safetensors")
    assert {mode(path) for path in tmp_path.iterdir()} == {expected}


@posix
@pytest.mark.parametrize("old", [0o600, 0o640, 0o664])
def test_a_file_keeps_its_mode_and_nobody_else_reads_what_replaces_it(tmp_path: Path, umask: None, old: int) -> None:
    for path in (tmp_path / "spec.json", tmp_path / "c.safetensors"):
        path.write_bytes(b"old")
        path.chmod(old)
    write_atomically(tmp_path / "spec.json", b"{}")
    make_context().save(tmp_path / "c.safetensors")
    assert {mode(path) for path in tmp_path.iterdir()} == {old}
    with renamed_into(tmp_path / "spec.json") as temporary:
        assert mode(temporary) == 0o600


@posix
def test_the_owner_and_group_of_a_file_stay(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root gives files away")
    path = tmp_path / "spec.json"
    path.write_bytes(b"old")
    os.chown(path, 12345, 54321)
    write_atomically(path, b"new")
    assert (path.stat().st_uid, path.stat().st_gid, path.read_bytes()) == (12345, 54321, b"new")


# names


@posix
def test_a_symlink_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, dangling = tmp_path / "link.safetensors", tmp_path / "dangling"
    link.symlink_to("elsewhere/c.safetensors")
    dangling.symlink_to(link)
    for name, context in ((link, make_context()), (dangling, make_context(4))):
        context.save(name)
        assert name.is_symlink()
        assert_same(StaticContext.load(tmp_path / "elsewhere" / "c.safetensors"), context)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["c.safetensors"]


@posix
def test_symlinks_in_a_ring_and_into_nowhere_are_refused_and_stay(tmp_path: Path) -> None:
    one, other, nowhere = (tmp_path / name for name in ("one", "other", "nowhere"))
    one.symlink_to(other)
    other.symlink_to(one)
    nowhere.symlink_to(tmp_path / "no folder" / "file")
    for name in (one, nowhere):
        with pytest.raises(OSError, match=f"'{name}'"):
            write_atomically(name, b"text")
    assert all(path.is_symlink() for path in tmp_path.iterdir())


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 121 + ".json")
    write_atomically(path, b"{}")
    with renamed_into(path):
        pass
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_a_descriptor_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from pathlib import Path; from lyra.spec.files import *; "]
    command[2] += "print('before', flush=True); write_atomically(Path('/dev/stdout'), b'within\\n'); print('after')"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run(command, stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "before\nwithin\nafter\n"
    assert Path("/dev/stdout").is_symlink()
    with (tmp_path / "out").open("ab") as out:
        command[2] = command[2].replace("/dev/stdout", f"/proc/{os.getpid()}/fd/{out.fileno()}")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "out").read_text() == "before\nwithin\nafter\nwithin\n"
    with pytest.raises(FileExistsError, match="is no file"), renamed_into(Path("/dev/stdout")):
        pass


# what is left behind

KILLED = """
import os, sys, time
from pathlib import Path
from lyra.spec.files import folder_renamed_into, renamed_into
door = folder_renamed_into if sys.argv[2] == "folder" else renamed_into
with door(Path(sys.argv[1])) as temporary:
    (temporary / "part" if temporary.is_dir() else temporary).write_bytes(b"x" * 1000)
    print(temporary, flush=True)
    time.sleep(60)
"""


def writing(path: Path, kind: str) -> tuple[subprocess.Popen[str], Path]:
    """A process in the middle of writing to a path, and its temporary file."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, path, kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


@posix
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_with_the_next_write_and_what_a_living_one_writes_stays(
    tmp_path: Path, kind: str
) -> None:
    path, other = tmp_path / "book", tmp_path / "book.lyra-x"
    (killed, left), (another, foreign), (living, held) = (writing(name, kind) for name in (path, other, path))
    for process in (killed, another):
        process.send_signal(signal.SIGKILL)
        process.wait()
    try:
        door = folder_renamed_into if kind == "folder" else renamed_into
        with door(path) as temporary:
            assert not left.exists()
            assert {foreign, held, temporary} == set(tmp_path.iterdir())
        assert {foreign, held, path} == set(tmp_path.iterdir())
    finally:
        living.kill()
        living.wait()
    if kind == "file":
        make_context().save(path)
        assert {foreign, path} == set(tmp_path.iterdir())


FULL = f"""
import resource, signal, sys
sys.path.insert(0, {TESTS!r})
from pathlib import Path
from small_contexts import make_context
from lyra.spec.files import write_atomically
context = make_context(64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (lambda: context.save("c.safetensors"), lambda: write_atomically(Path("t.json"), b"x" * 5000)):
    try:
        write()
    except OSError as error:
        print(type(error).__name__, error)
"""


@posix
def test_a_full_disk_is_said_in_a_line_and_nothing_is_left(tmp_path: Path) -> None:
    make_context().save(tmp_path / "c.safetensors")
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "OSError [Errno 27] File too large: 'c.safetensors'",
        "OSError [Errno 27] File too large: 't.json'",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    assert StaticContext.load(tmp_path / "c.safetensors").num_tokens == 6


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as refusal:
        make_context().save(tmp_path / "none" / "c.safetensors")
    assert str(refusal.value) == f"[Errno 2] No such file or directory: '{tmp_path / 'none' / 'c.safetensors'}'"


def test_a_folder_is_renamed_whole_or_not_at_all(tmp_path: Path) -> None:
    with folder_renamed_into(tmp_path / "deep" / "model") as made:
        (made / "config.json").write_text("{}")
    with pytest.raises(ZeroDivisionError), folder_renamed_into(tmp_path / "deep" / "other") as made:
        (made / "config.json").write_text(str(1 / 0))
    with pytest.raises(OSError, match="model"), folder_renamed_into(tmp_path / "deep" / "model") as made:
        (made / "config.json").write_text("other")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]
    assert (tmp_path / "deep" / "model" / "config.json").read_text() == "{}"


# one door

BESIDES = {
    "api/gguf_convert.py": "into the folder of folder_renamed_into",
    "backends/jax_impl/saving.py": "into the folder of folder_renamed_into",
    "bench/speed": "into its own scratch folder, gone in the end; /proc; the pipe to its worker",
    "bench/peft_prefix.py": "into its own scratch folder",
    "conformance/properties": "into their own scratch folders",
    "conformance/supervisor.py": "its journal, into its own scratch folder",
    "conformance/report/markdown.py": "a job's summary, which is appended to",
    "spec/files.py": "the door",
    "spec/tensor_file.py": "into the file of renamed_into",
    "studies/figures.py": "a picture in memory",
    "bench/calibration.py": "a picture in memory",
}
"""Where files are written without the door, and why."""

WRITERS = {"write_text", "write_bytes", "save_file", "savefig", "mkstemp", "NamedTemporaryFile"}


def makes_a_file(call: ast.Call) -> bool:
    """Whether a call opens a file to write to it, or is another way to make one."""
    of = call.func.value if isinstance(call.func, ast.Attribute) else None
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = [
        one.value for one in (*call.args, *(word.value for word in call.keywords)) if isinstance(one, ast.Constant)
    ]
    if name in {"open", "fdopen"}:
        return any(isinstance(mode, str) and len(mode) < 4 and set(mode) & set("wax+") for mode in given)
    return name in WRITERS or (name in {"replace", "rename"} and getattr(of, "id", "") == "os")


def writes(path: Path) -> bool:
    """Whether a module makes files."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.Call) and makes_a_file(node) for node in ast.walk(tree))


def test_every_file_is_written_through_one_door() -> None:
    packages = ("api", "spec", "backends", "conformance", "choosing", "studies", "bench", "examples")
    found = {
        path.relative_to(ROOT).as_posix() for part in packages for path in (ROOT / part).rglob("*.py") if writes(path)
    }
    assert "spec/files.py" in found
    unknown = {name for name in found if not any(name == one or name.startswith(f"{one}/") for one in BESIDES)}
    assert not unknown, "write files with renamed_into, folder_renamed_into or write_atomically of lyra.spec.files"


@posix
def test_capturing_onto_a_full_disk_ends_in_a_line(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    from typer.testing import CliRunner

    from lyra.cli import application

    monkeypatch.setenv("LYRA_MODEL", str(tiny_folder))
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("the hand and the note of the other", encoding="utf-8")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        done = CliRunner().invoke(application(), ["capture", "book.txt", "book.safetensors"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == "error: [Errno 27] File too large: 'book.safetensors'"
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]
