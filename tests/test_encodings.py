"""Text files are UTF-8 whatever the locale: everything that reads or writes text says so."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("api", "spec", "backends", "conformance", "choosing", "studies", "bench", "examples")

TEXT_METHODS = {"read_text": 0, "write_text": 1}
"""Where `encoding` stands among the arguments given by position."""

OPENERS = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}
"""Functions, and where their mode stands; a method `open` has it one place before."""


def forgetful(source: str) -> list[int]:
    """The lines of calls that would take the locale's encoding."""
    return [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and _takes_locale(node)]


def _takes_locale(call: ast.Call) -> bool:
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in named or None in named:
        return False
    is_method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in TEXT_METHODS:
        return len(call.args) <= TEXT_METHODS[name]
    if any(one in named and _value(named[one]) is True for one in ("text", "universal_newlines")):
        return True
    if name not in OPENERS or (is_method and getattr(call.func.value, "id", "") == "os" and name == "open"):
        return False
    place = OPENERS[name] - (is_method and name == "open")
    mode = named.get("mode", call.args[place] if len(call.args) > place else None)
    default = "r" if name in ("open", "fdopen") else "w+b"
    text = default if mode is None else _value(mode)
    return isinstance(text, str) and "b" not in text


def _value(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _sources() -> Iterator[Path]:
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_every_text_is_read_and_written_with_an_encoding() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in _sources()
        for line in forgetful(path.read_text(encoding="utf-8"))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "path.read_text()",
        "(files('lyra.spec') / 'SPEC.md').read_text()",
        "path.write_text(text)",
        "open(path)",
        "open(path, 'w', newline='')",
        "path.open('a')",
        "path.open()",
        "os.fdopen(handle, 'w')",
        "subprocess.run(command, text=True)",
        "NamedTemporaryFile('w')",
    ],
)
def test_a_call_without_an_encoding_is_found(source: str) -> None:
    assert forgetful(source) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "path.read_text(encoding='utf-8')",
        "open(path, 'rb')",
        "path.open('wb')",
        "os.open(os.devnull, os.O_WRONLY)",
        "safe_open(path, framework='numpy')",
        "NamedTemporaryFile()",
        "subprocess.run(command)",
    ],
)
def test_bytes_need_none(source: str) -> None:
    assert forgetful(source) == []
