"""Which properties of the suite call which functions of a backend: a mutant of one is tried on no others."""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from lyra.backends.protocol import get_backend
from lyra.conformance.faults.catalogue import FaultError, backend_package
from lyra.conformance.launch import prepare_environment
from lyra.conformance.runner import run
from lyra.conformance.session import PROFILES, Session

Function = tuple[str, int]
"""A function of a backend: its file and its first line, that of a decorator where it has one."""


def folder_of(backend: str) -> Path:
    """Where the modules of a backend are."""
    package = find_spec(backend_package(backend))
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent


def source_of(backend: str, file: str) -> str:
    """The text of a module of a backend; empty where the backend has no such module."""
    path = folder_of(backend) / file
    return path.read_text(encoding="utf-8") if path.exists() else ""


def callers(backend: str, profile: str) -> dict[Function, set[str]]:
    """The properties, by name, that call each function of a backend, from a run of the suite on it as it is.

    Raises FaultError where it fails.
    """
    prepare_environment()
    session = Session(backends=[get_backend(backend)], profile=PROFILES[profile])
    folder = str(folder_of(backend))
    called: set[Function] = set()
    found: dict[Function, set[str]] = {}

    def see(frame: FrameType, event: str, value: object) -> None:
        code = frame.f_code
        if code.co_filename.startswith(folder):
            called.add((Path(code.co_filename).name, code.co_firstlineno))

    def ended(name: str, done: int, total: int) -> None:
        for function in called:
            found.setdefault(function, set()).add(name.partition("[")[0] or "test")  # before the first: all
        called.clear()
        if jax := sys.modules.get("jax"):
            jax.clear_caches()  # what is compiled already would run for the next property without a call

    sys.settrace(see)
    try:
        run(session, progress=ended)
    finally:
        sys.settrace(None)
    if not session.record.ok:
        raise FaultError(f"the unchanged backend {backend!r} fails: see `lyra conform --backend {backend}`")
    return found


def home(backend: str, file: str, line: int) -> Function | None:
    """The function in whose body a line of a module is, the innermost; None outside all."""
    found: Function | None = None
    for node in ast.walk(ast.parse(source_of(backend, file))):
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno <= line <= (node.end_lineno or 0):
            found = (file, min(line.lineno for line in (node, *node.decorator_list)))
    return found
