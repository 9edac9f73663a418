"""Put a fault into a backend: a second copy of its modules, imported in this process from patched source.

The real backend stays as it is. Its modules step aside while the faulty copy is in use and come back afterwards;
nothing is written to disk, no byte code either.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, ModuleType

from lyra.backends.protocol import Backend, get_backend

from .catalogue import Fault, FaultError, backend_package, patched_source


class PatchedLoader(importlib.machinery.SourceFileLoader):
    """Loads one module from patched source. A traceback quotes it, under the file's name and the fault's."""

    def __init__(self, fullname: str, path: str, source: str, fault: str) -> None:
        super().__init__(fullname, path)
        self._source = source
        self._fault = fault

    def get_source(self, fullname: str) -> str:
        """The patched text: what a traceback quotes."""
        return self._source

    def get_code(self, fullname: str) -> CodeType:
        """Compiled here, so that no cached byte code is read or written."""
        return compile(self._source, f"{self.path} with {self._fault}", "exec", dont_inherit=True)


class PatchedFinder(importlib.abc.MetaPathFinder):
    """Finds the one module that a fault changes."""

    def __init__(self, module: str, source: str, fault: str) -> None:
        self._module = module
        self._source = source
        self._fault = fault

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of the changed module with the loader of the patched source; None for any other module."""
        if fullname != self._module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return None
        spec.loader = PatchedLoader(fullname, spec.origin, self._source, self._fault)
        return spec


@contextmanager
def injected(fault: Fault, backend: str) -> Iterator[Backend]:
    """A fresh backend of this name with the fault in it, as long as the block runs.

    Raises FaultError for a dead or ambiguous anchor and for a fault that keeps the backend from being imported.
    """
    module, source = patched_source(fault, backend)
    finder = PatchedFinder(module, source, fault.id)
    with _set_aside(backend_package(backend)):
        sys.meta_path.insert(0, finder)
        _active.append(fault)
        try:
            try:
                made = get_backend(backend)
                importlib.import_module(module)  # now: pytest puts a finder of its own in front of this one
            except Exception as error:
                raise FaultError(f"fault {fault.id!r}, backend {backend!r}: cannot be imported ({error})") from error
            yield made
        finally:
            _active.remove(fault)
            sys.meta_path.remove(finder)


def active() -> Fault | None:
    """The fault that is in a backend now, if there is one: what another process is told that is to have it too."""
    return _active[-1] if _active else None


_active: list[Fault] = []


@contextmanager
def _set_aside(package: str) -> Iterator[None]:
    """Forget a package and its modules for as long as the block runs; then put back the ones that were there."""
    parent_name, _, name = package.rpartition(".")
    parent = importlib.import_module(parent_name)
    attribute = getattr(parent, name, None)
    kept = _forget(package)
    try:
        yield
    finally:
        _forget(package)
        sys.modules.update(kept)
        if attribute is not None:
            setattr(parent, name, attribute)
        elif hasattr(parent, name):
            delattr(parent, name)


def _forget(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}
