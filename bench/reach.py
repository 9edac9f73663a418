"""Which properties of the suite call which functions of a backend: a mutant of one is tried on no others."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

from lyra.backends.protocol import get_backend
from lyra.conformance.faults.catalogue import FaultError, backend_package, package_folder
from lyra.conformance.launch import prepare_environment
from lyra.conformance.runner import run
from lyra.conformance.session import PROFILES, Session

Function = tuple[str, str]
"""A function of a backend: its file and its dotted name in it."""


def callers(backend: str, profile: str) -> dict[Function, set[str]]:
    """The properties, by name, that call each function of a backend, from a run of the suite on it as it is.

    Raises FaultError where it fails.
    """
    prepare_environment()
    session = Session(backends=[get_backend(backend)], profile=PROFILES[profile])
    folder = package_folder(backend_package(backend))
    called: set[Function] = set()
    found: dict[Function, set[str]] = {}

    def see(frame: FrameType, event: str, value: object) -> None:
        code = frame.f_code
        if code.co_filename.startswith(str(folder)):
            file = Path(code.co_filename).relative_to(folder).as_posix()
            called.add((file, code.co_qualname.replace(".<locals>", "")))

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
