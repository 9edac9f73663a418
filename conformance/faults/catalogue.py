"""The catalogue of faults: what each one is, which statements it breaks, and how to make it in every backend.

One TOML file per clause stands beside this module:

    [norm-after-rope]
    breaks = ["ORDER-1"]
    does = "queries and keys are rotated before they are normed"
    [norm-after-rope.backends.torch]
    file = "layer.py"
    edits = [{ find = "in spec.order:", replace = "in (...):" }]

`find` must stand exactly once in the file, so that an edit never goes to a wrong place or nowhere.
"""

from __future__ import annotations

import importlib.util
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lyra.backends.protocol import CAPABILITIES
from lyra.spec.clauses import clauses, statements
from lyra.spec.errors import InputError, SpecError

STRICT = ConfigDict(frozen=True, extra="forbid")


class FaultError(InputError):
    """A fault that cannot be made: an unknown name, a malformed entry, or an anchor that the source has not once."""


class Edit(BaseModel):
    """Replace the one place where `find` stands."""

    model_config = STRICT

    find: str = Field(min_length=1)
    replace: str


class Patch(BaseModel):
    """Edits of one file of a backend; `file` is relative to the backend's folder."""

    model_config = STRICT

    file: str
    edits: tuple[Edit, ...] = Field(min_length=1)


class Fault(BaseModel):
    """One fault. `breaks` are statements of SPEC.md, the one it is listed under first; `does` says what goes wrong.

    `needs` is the capability without which a backend cannot have it; a backend that has it needs an edit.
    """

    model_config = STRICT

    id: str
    breaks: tuple[str, ...] = Field(min_length=1)
    does: str
    needs: str | None = None
    backends: dict[str, Patch] = Field(min_length=1)

    @property
    def clause(self) -> str:
        """The clause of its first statement."""
        return statements()[self.breaks[0]].clause

    def patch(self, backend: str) -> Patch:
        """How it is made in a backend. Raises FaultError where the catalogue does not say."""
        if backend not in self.backends:
            raise FaultError(f"fault {self.id!r} has no edit for backend {backend!r}; it has {sorted(self.backends)}")
        return self.backends[backend]


@cache
def catalogue() -> dict[str, Fault]:
    """Every fault by id, clause by clause in the order of SPEC.md. Raises FaultError for a malformed catalogue."""
    found: dict[str, Fault] = {}
    for name in clauses():
        file = files("lyra.conformance.faults") / f"{name.lower()}.toml"
        if not file.is_file():
            continue
        for fault in parse(file.read_text(encoding="utf-8"), file.name):
            if fault.clause != name:
                raise FaultError(f"{file.name}: fault {fault.id!r} breaks {fault.breaks[0]}, so it belongs elsewhere")
            if fault.id in found:
                raise FaultError(f"{file.name}: fault {fault.id!r} stands in {found[fault.id].clause} too")
            found[fault.id] = fault
    return found


def parse(text: str, source: str) -> list[Fault]:
    """The faults of one TOML text. Raises FaultError."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FaultError(f"{source}: not TOML ({error})") from None
    found = [_fault(name, table, source) for name, table in tables.items()]
    for fault in found:
        unknown = [one for one in fault.breaks if one not in statements()]
        if unknown:
            raise FaultError(f"{source}: fault {fault.id!r} breaks {unknown}, which SPEC.md does not have")
        if fault.needs is not None and fault.needs not in CAPABILITIES:
            raise FaultError(f"{source}: fault {fault.id!r} needs {fault.needs!r}, which is no capability")
    return found


def _fault(name: str, table: Any, source: str) -> Fault:
    if not isinstance(table, dict):
        raise FaultError(f"{source}: {name!r} is {table!r}; expected a table [{name}]")
    try:
        return Fault.model_validate({"id": name} | table)
    except ValidationError as error:
        raise FaultError(f"{source}: {SpecError.from_validation(f'fault {name!r}', error)}") from None


def select(only: list[str]) -> list[Fault]:
    """The faults with these ids or of these clauses or statements; all without a selection. Raises FaultError."""
    known = catalogue().values()
    for one in only:
        if not any(_matches(fault, one) for fault in known):
            raise FaultError(f"{one!r} is no fault and no clause or statement with faults; see `lyra faults --list`")
    return [fault for fault in known if not only or any(_matches(fault, one) for one in only)]


def _matches(fault: Fault, wanted: str) -> bool:
    return wanted == fault.id or wanted.upper() in {fault.clause, *fault.breaks}


def backend_package(backend: str) -> str:
    """The package of a backend that faults are made in."""
    return f"lyra.backends.{backend}_impl"


def patched_source(fault: Fault, backend: str) -> tuple[str, str]:
    """The module that a fault changes, and its source with the fault in it.

    Raises FaultError, naming fault, backend and file, where the file is missing or an anchor is dead or ambiguous.
    """
    patch = fault.patch(backend)
    module = f"{backend_package(backend)}.{patch.file.removesuffix('.py').replace('/', '.')}"
    where = f"fault {fault.id!r}, backend {backend!r}, file {patch.file!r}"
    spec = importlib.util.find_spec(backend_package(backend))
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    try:
        source = (folder / patch.file).read_text(encoding="utf-8")
    except OSError as error:
        raise FaultError(f"{where}: cannot be read ({error.strerror})") from None
    for edit in patch.edits:
        source = apply(edit, source, where)
    return module, source


def apply(edit: Edit, source: str, where: str) -> str:
    """The source with one edit made. Raises FaultError unless the anchor stands exactly once."""
    count = source.count(edit.find)
    if count != 1:
        problem = "is dead: the source does not have it" if count == 0 else f"is ambiguous: it stands {count} times"
        raise FaultError(f"{where}: the anchor {edit.find!r} {problem}")
    return source.replace(edit.find, edit.replace)
