"""Put a fault into a backend: a second copy of its modules, imported in this process from patched source.

The copy is a package of its own beside the real one (`lyra.backends.torch_impl__norm_after_rope_1`), so the real one
stays as it is and where it is. Nothing is written to disk, no byte code either. The module that drives a backend as a
subject is copied too, and imports the copy where it names the backend's package.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType

from lyra.backends.protocol import Backend, get_backend, known_backends, known_subjects

from .catalogue import Fault, FaultError, backend_package, module_name, package_folder, patched_sources


@dataclass(frozen=True)
class Copy(importlib.abc.MetaPathFinder):
    """Finds the modules of a copy of some packages: `names` are the copies' by the packages' own, `sources` the text of
    the files that differ by their paths.
    """

    fault: Fault
    names: Mapping[str, str]
    sources: Mapping[str, str] = field(repr=False)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of a module of the copy; None for any other module."""
        for original, copy in self.names.items():
            if fullname == copy:
                spec = importlib.util.find_spec(original)
            elif fullname.startswith(f"{copy}."):
                spec = importlib.machinery.PathFinder.find_spec(original + fullname.removeprefix(copy), path)
            else:
                continue
            if spec is None or spec.origin is None:
                return None
            loader = CopyLoader(fullname, spec.origin, self)
            return importlib.util.spec_from_file_location(
                fullname, spec.origin, loader=loader, submodule_search_locations=spec.submodule_search_locations
            )
        return None

    def with_imports(self, source: str) -> str:
        """A module's source with imports of what is copied turned to the copy."""
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    if whole in self.names:
                        alias.asname = alias.asname or alias.name
                        alias.name = self.names[whole].rpartition(".")[2]
                node.module = self.named(node.module)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    alias.name = self.named(alias.name)
        return ast.unparse(tree)

    def named(self, module: str) -> str:
        """The copy's name of a module; a module's own where it is not copied."""
        for original, copy in self.names.items():
            if f"{module}.".startswith(f"{original}."):
                return copy + module.removeprefix(original)
        return module


class CopyLoader(importlib.machinery.SourceFileLoader):
    """Loads a module of a copy. A traceback quotes what was patched, under the file's name and the fault's."""

    def __init__(self, fullname: str, path: str, copy: Copy) -> None:
        super().__init__(fullname, path)
        written = Path(path).read_text(encoding="utf-8")
        source = copy.sources.get(path, written)
        if any(original in source for original in copy.names):
            source = copy.with_imports(source)
        self._source = None if source == written else source
        self._fault = copy.fault.id

    def get_source(self, fullname: str) -> str | None:
        """The text that is run: what a traceback quotes."""
        return super().get_source(fullname) if self._source is None else self._source

    def get_code(self, fullname: str) -> CodeType | None:
        """Compiled here where it differs, so that no cached byte code is read or written."""
        if self._source is None:
            return super().get_code(fullname)
        return compile(self._source, f"{self.path} with {self._fault}", "exec", dont_inherit=True)


_faults: dict[str, Fault] = {}
"""The fault of every copy, by the name of its package."""


@contextmanager
def injected(fault: Fault, backend: str) -> Iterator[Backend]:
    """A fresh backend of this name with the fault in it, as long as the block runs.

    Raises FaultError for a dead or ambiguous pattern and for a fault that keeps the backend from being imported.
    """
    package, point = backend_package(backend), (known_backends() | known_subjects())[backend]
    module, _, attribute = point.value.partition(":")
    home = package if f"{module}.".startswith(f"{package}.") else module.rpartition(".")[0]
    suffix = f"__{re.sub(r'[^a-z0-9]+', '_', fault.id.lower())}_{len(_faults)}"
    names = {original: original + suffix for original in (package, home)}
    patched = patched_sources(fault, backend)
    copy = Copy(fault, names, {str(package_folder(package) / file): source for file, source in patched.items()})
    _faults.update(dict.fromkeys(names.values(), fault))
    sys.meta_path.insert(0, copy)
    try:
        try:
            faulty = get_backend(f"{copy.named(module)}:{attribute}")
            for file in patched:
                importlib.import_module(copy.named(module_name(package, file)))
        except Exception as error:
            raise FaultError(f"fault {fault.id!r}, backend {backend!r}: cannot be imported ({error})") from error
        yield faulty
    finally:
        sys.meta_path.remove(copy)


def fault_in(backend: Backend) -> Fault | None:
    """The fault that was put into a backend, if it is a faulty one: another process is told to put it in there too."""
    module = type(backend).__module__
    return next((fault for name, fault in _faults.items() if f"{module}.".startswith(f"{name}.")), None)
