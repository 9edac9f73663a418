"""A backend that cannot be found, imported, made or used: one line that says which and where, from every door."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lyra
from lyra.backends.protocol import BackendEnded, BackendNotFound, check_backend, get_backend
from lyra.backends.raised import interrupts_watched, raised
from lyra.cli import application
from lyra.conformance.launch import load_backends
from lyra.conformance.session import UsageError

GOOD = """
class Good:
    name = "good"
    capabilities = frozenset({"static"})
    def attention(self, spec, weights):
        raise NotImplementedError
"""

# what a module says, what is asked of it, what the message says, and the line of it that is named
MADE = "class B:\n  def __init__(self):\n    raise "
IS = f"{GOOD}class B(Good): "

ODD: dict[str, tuple[str, str, str, int | None]] = {
    "raises at import": ("x = 1\nx / 0", "B", "cannot be imported: ZeroDivisionError", 2),
    "in a function at import": ("def f():\n    return {}['k']\nf()", "B", "cannot be imported: KeyError: 'k'", 2),
    "in another library at import": ("import json\njson.loads('{')", "B", "cannot be imported: JSONDecodeError", 2),
    "syntax": ("def f(:\n  pass", "B", "cannot be imported: SyntaxError", 1),
    "null bytes": ("x = 1\0", "B", "cannot be imported: SyntaxError", None),
    "missing library": ("import nowhere_at_all", "B", "No module named 'nowhere_at_all'", 1),
    "recursion at import": ("def f(): return f()\nf()", "B", "cannot be imported: RecursionError", 1),
    "no such name": (GOOD, "Bad", "has no 'Bad'; it has Good", None),
    "an object": ("B = 5", "B", "is int and no class", None),
    "a module": ("import json as B", "B", "is module and no class", None),
    "arguments": ("class B:\n  def __init__(self, device, *, of): ...", "B", "needs arguments (device, of)", None),
    "raises when made": (f"{MADE}ValueError('no\\ndevice')", "B", "cannot be made: ValueError: no device", 3),
    "no message": (f"{MADE}ValueError", "B", "cannot be made: ValueError (", 3),
    "odd message": (f"class E(Exception):\n  def __str__(self): return 1\n{MADE}E", "B", "E: its message cannot", 5),
    "nothing": ("class B: ...", "B", "B is no backend: it lacks name, capabilities, attention", None),
    "no capabilities": ("class B:\n  name = 'b'\n  def attention(self): ...", "B", "it lacks capabilities", None),
    "capabilities None": (f"{IS}capabilities = None", "B", "its capabilities are None", None),
    "capabilities a text": (f"{IS}capabilities = 'static'", "B", "capabilities are 'static'", None),
    "capabilities numbers": (f"{IS}capabilities = [1, None]", "B", "unknown capabilities ['1'", None),
    "capabilities unknown": (f"{IS}capabilities = {{'statik'}}", "B", "unknown capabilities ['statik']", None),
    "capabilities raise": (
        f"{IS}\n  @property\n  def capabilities(self):\n    return self.capabilities",
        "B",
        "does not give its capabilities: RecursionError",
        10,
    ),
    "name a number": (f"{IS}name = 5", "B", "its name is 5; expected a text", None),
    "name empty": (f"{IS}name = ''", "B", "its name is ''; expected a text", None),
    "name of two lines": (f"{IS}name = 'a\\nb'", "B", "its name is 'a\\nb'; expected a text", None),
    "name of two": (f"{IS}name = 'a ↔ b'", "B", "stands between two backends", None),
    "attention a value": (f"{IS}attention = 5", "B", "its attention is int; expected a method", None),
    "returns a class": (f"{GOOD}def B(): return Good", "B", "no backend: give an object of it, Good()", None),
    "returns nothing": ("def B(): ...", "B", "NoneType is no backend", None),
}

ENDS: dict[str, tuple[str, str]] = {
    "exit at import": ("import sys\nsys.exit(0)", "cannot be imported: SystemExit: 0 (ends.py, line 2)"),
    "exit when made": ("class B:\n  def __init__(self):\n    exit()", "cannot be made: SystemExit"),
    "interrupt": ("raise KeyboardInterrupt", "cannot be imported: KeyboardInterrupt (ends.py, line 1)"),
    "generator": ("class B:\n  def __init__(self):\n    raise GeneratorExit", "cannot be made: GeneratorExit"),
    "outcome": ("import pytest\npytest.skip('no', allow_module_level=True)", "cannot be imported: Skipped: no"),
}


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of a test are found in its folder, and forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if not getattr(sys.modules[name], "__file__", None) or str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(("source", "name", "words", "line"), ODD.values(), ids=ODD)
def test_what_gives_no_backend_is_refused_in_a_line(source: str, name: str, words: str, line: int | None) -> None:
    Path("odd.py").write_text(source, encoding="utf-8")
    with pytest.raises((BackendNotFound, ImportError)) as caught:
        get_backend(f"odd:{name}")
    said = str(caught.value)
    assert words in said
    assert "\n" not in said
    assert line is None or f"(odd.py, line {line})" in said
    assert not isinstance(caught.value, BackendEnded)
    shown = CliRunner().invoke(application(), ["generate", "hi", "--backend", f"odd:{name}"], env={"COLUMNS": "100"})
    assert shown.exit_code == 2
    assert shown.stderr == f"error: {said}\n"


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(("source", "words"), ENDS.values(), ids=ENDS)
def test_what_ends_the_process_while_it_is_loaded_is_refused_too(source: str, words: str) -> None:
    Path("ends.py").write_text(source)
    with pytest.raises(BackendEnded) as caught:
        get_backend("ends:B")
    assert words in str(caught.value)
    assert "tries to end the process" in str(caught.value)
    with pytest.raises(BackendNotFound):
        lyra.load(backend="ends:B")


@pytest.mark.usefixtures("_here")
def test_the_last_line_of_a_package_of_the_users_is_named() -> None:
    """Not that of a library it calls, nor one of ours."""
    Path("mine").mkdir()
    Path("mine/__init__.py").write_text("")
    Path("mine/inner.py").write_text("import json\n\ndef read():\n    return json.loads('')\n")
    Path("mine/outer.py").write_text("from .inner import read\nclass B:\n    def __init__(self):\n        read()\n")
    with pytest.raises(BackendNotFound, match=r"JSONDecodeError: .* \(mine/inner\.py, line 4\)"):
        get_backend("mine.outer:B")


@pytest.mark.parametrize(
    "name", ["", " ", "torch ", "a:", ":B", "a:b:c", "a b:C", "a.py:B", "../a:B", "a-b:C", "a:B()"]
)
def test_what_is_no_name_of_a_backend(name: str) -> None:
    with pytest.raises(BackendNotFound, match=r"package\.module:Class"):
        get_backend(name)


def test_names_that_are_no_texts() -> None:
    with pytest.raises(BackendNotFound, match="goes by its name, not by an object of type int"):
        get_backend(5)  # type: ignore[arg-type]
    with pytest.raises(BackendNotFound, match="int is no backend: it lacks name"):
        lyra.load(backend=5)  # type: ignore[arg-type]
    with pytest.raises(BackendNotFound, match="no module 'nowhere'; PYTHONPATH names folders"):
        get_backend("nowhere.at.all:B")


class Good:
    """A backend that is never called."""

    name = "good"
    capabilities = frozenset({"static"})

    def attention(self, *_: Any) -> None:
        """Nothing."""


def test_a_backend_is_no_class() -> None:
    assert check_backend(Good()).name == "good"
    with pytest.raises(BackendNotFound, match=r"give an object of it, Good\(\)"):
        check_backend(Good)


@pytest.mark.usefixtures("_here")
def test_two_backends_of_one_name_are_refused() -> None:
    """Their answers would be counted as one backend's."""
    Path("twice.py").write_text(f"{GOOD}\nclass Other(Good): ...")
    with pytest.raises(UsageError, match="'twice:Good' and 'twice:Other' both have the name 'good'"):
        load_backends(["twice:Good", "twice:Other"])
    assert [backend.name for backend in load_backends(["twice:Good", "twice:Good"])] == ["good"]


def test_errors_are_told_in_a_line_that_ends() -> None:
    assert raised(ValueError("x" * 10_000)).endswith("x…")
    assert len(raised(ValueError("x" * 10_000))) < 700
    assert raised(SystemExit(0)) == "SystemExit: 0"
    assert raised(KeyboardInterrupt()) == "KeyboardInterrupt"


PRESSED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from lyra.backends.registry import get_backend
get_backend("slow:B")
"""


def test_ctrl_c_during_an_import_is_the_users(tmp_path: Path) -> None:
    tmp_path.joinpath("slow.py").write_text(
        textwrap.dedent("""
        import os, signal, time
        os.kill(os.getpid(), signal.SIGINT)  # stands for the key
        time.sleep(20)
        """)
    )
    done = subprocess.run([sys.executable, "-P", "-c", PRESSED, tmp_path], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "BackendEnded" not in done.stderr


def test_a_handler_of_somebody_else_is_called_and_put_back() -> None:
    seen = []

    def mine(number: int, frame: object) -> None:
        seen.append(number)

    before = signal.signal(signal.SIGINT, mine)
    try:
        with interrupts_watched(), interrupts_watched():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]
