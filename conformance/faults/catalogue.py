"""The catalogue of faults: what each one is, which statements it breaks, and how to make it in every backend.

TOML files stand beside this module, one per clause:

    [merge-without-rescaling]
    breaks = ["STATIC-1"]
    does = "the live and the static part are added without bringing them to one maximum"
    [merge-without-rescaling.backends]
    torch = [{ in = "merge", find = "weights($A, $B, $TOP)", replace = "(torch.ones_like($TOP),) * 2" }]

`in` says where: the name of a function or a class in the backend's package, with as much of the dotted path before it
as makes it the only one ("run_layer", "LiveCache.append", "layer.norm", "families.gemma3.Layer.forward"), so that code
may move to another file; for what stands in no function the file itself ("dtype.py"). `find` is a small pattern of
syntax (`lyra.conformance.faults.patterns`) that must match exactly once there, so that an edit never goes to a wrong
place or nowhere: write `$NAME` for a local variable, so that it may be renamed, and no more of the code than states the
fault. For a local that `find` does not meet, `given = ["$Q, $K = norm($$$)"]` lists patterns that are matched before it
and bind more variables. Edits are made one after another. `torch-module` and `jax-module` in the place of a backend are
the same package, judged as whole modules.
"""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lyra.backends.protocol import CAPABILITIES
from lyra.spec.clauses import clauses, statements
from lyra.spec.errors import InputError, SpecError

from .patterns import PatternError, check, definitions, edited

STRICT = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class FaultError(InputError):
    """A fault that cannot be made: an unknown name, a malformed entry, or a pattern that does not match once."""


class Edit(BaseModel):
    """Replace the one match of `find` in one definition; `given` are patterns that bind variables before."""

    model_config = STRICT

    where: str = Field(alias="in", min_length=1)
    find: str = Field(min_length=1)
    replace: str
    given: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _is_syntax(self) -> Edit:
        check(self.find, self.replace, self.given)
        return self


class Fault(BaseModel):
    """One fault. `breaks` are statements of SPEC.md, the one it is listed under first; `does` says what goes wrong.

    `needs` is the capability without which a backend cannot have it; a backend that has it needs an edit.
    """

    model_config = STRICT

    id: str
    breaks: tuple[str, ...] = Field(min_length=1)
    does: str
    needs: str | None = None
    backends: dict[str, Annotated[tuple[Edit, ...], Field(min_length=1)]] = Field(min_length=1)

    @property
    def clause(self) -> str:
        """The clause of its first statement."""
        return statements()[self.breaks[0]].clause

    def edits(self, backend: str) -> tuple[Edit, ...]:
        """How it is made in a backend. Raises FaultError where the catalogue does not say."""
        if backend not in self.backends:
            raise FaultError(f"fault {self.id!r} has no edit for backend {backend!r}; it has {sorted(self.backends)}")
        return self.backends[backend]


@cache
def catalogue() -> dict[str, Fault]:
    """Every fault by id, clause by clause in the order of SPEC.md. Raises FaultError for a malformed catalogue.

    A file with a clause's name holds that clause's faults only, `wiring_*.toml` those of the wiring of modules.
    """
    faults: dict[str, tuple[Fault, str]] = {}
    for file in sorted(files("lyra.conformance.faults").iterdir(), key=lambda file: file.name):
        name, _, kind = file.name.partition(".")
        if kind != "toml":
            continue
        for fault in parse(file.read_text(encoding="utf-8"), file.name):
            if name.upper() != fault.clause and not name.startswith("wiring"):
                raise FaultError(f"{file.name}: fault {fault.id!r} breaks {fault.breaks[0]}, so it belongs elsewhere")
            if fault.id in faults:
                raise FaultError(f"{file.name}: fault {fault.id!r} stands in {faults[fault.id][1]} too")
            faults[fault.id] = fault, file.name
    order = list(clauses())
    return {id: fault for id, (fault, _) in sorted(faults.items(), key=lambda item: order.index(item[1][0].clause))}


def parse(text: str, source: str) -> list[Fault]:
    """The faults of one TOML text. Raises FaultError."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FaultError(f"{source}: not TOML ({error})") from None
    faults = [_fault(name, table, source) for name, table in tables.items()]
    for fault in faults:
        unknown = [statement for statement in fault.breaks if statement not in statements()]
        if unknown:
            raise FaultError(f"{source}: fault {fault.id!r} breaks {unknown}, which SPEC.md does not have")
        if fault.needs is not None and fault.needs not in CAPABILITIES:
            raise FaultError(f"{source}: fault {fault.id!r} needs {fault.needs!r}, which is no capability")
    return faults


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
    for wanted in only:
        if not any(_matches(fault, wanted) for fault in known):
            raise FaultError(f"{wanted!r} is no fault and no clause or statement with faults; see `lyra faults --list`")
    return [fault for fault in known if not only or any(_matches(fault, wanted) for wanted in only)]


def _matches(fault: Fault, wanted: str) -> bool:
    return wanted == fault.id or wanted.upper() in {fault.clause, *fault.breaks}


def backend_package(backend: str) -> str:
    """The package of a backend that faults are made in; that of a subject is the one that it drives."""
    return f"lyra.backends.{backend.removesuffix('-module')}_impl"


def patched_sources(fault: Fault, backend: str) -> dict[str, str]:
    """The files that a fault changes, by their paths from the package's folder, each as it is with the fault in it.

    Raises FaultError as `with_fault` does.
    """
    before = sources(backend_package(backend))
    return {file: source for file, source in with_fault(fault, backend, before).items() if source != before[file]}


def with_fault(fault: Fault, backend: str, sources: Mapping[str, str]) -> dict[str, str]:
    """The files of a backend's package, by their paths from its folder, with a fault in them.

    Raises FaultError, naming fault, backend, file and function, where a function is missing or not the only one of its
    name, and where a pattern matches nothing in it or more than once.
    """
    about = f"fault {fault.id!r}, backend {backend!r}"
    after = dict(sources)
    for edit in fault.edits(backend):
        file, definition = place_of(edit.where, after, about)
        try:
            after[file] = edited(after[file], definition, edit.find, edit.replace, edit.given)
        except PatternError as error:
            within = f", {definition!r}" if definition else ""
            raise FaultError(f"{about}, file {file!r}{within}: {error}") from None
    return after


def package_folder(package: str) -> Path:
    """Where a package's files are. Raises FaultError where there is no such package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FaultError(f"there is no package {package!r} to make faults in")
    return Path(spec.origin).parent


def module_name(package: str, file: str) -> str:
    """The dotted name of a package's file."""
    return f"{package}.{file.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")


@cache
def sources(package: str) -> dict[str, str]:
    """The source of every module of a package, by its file's path from the package's folder."""
    folder = package_folder(package)
    files = sorted(folder.rglob("*.py"))
    return {file.relative_to(folder).as_posix(): file.read_text(encoding="utf-8") for file in files}


@cache
def _definitions(source: str) -> tuple[str, ...]:
    return tuple(definitions(source))


def place_of(where: str, sources: Mapping[str, str], about: str) -> tuple[str, str]:
    """The file and the definition in it that `in` means, nothing for all of a file. Raises FaultError."""
    if where.endswith(".py"):
        if where not in sources:
            raise FaultError(f"{about}: there is no file {where!r}")
        return where, ""
    places = [
        (file, name)
        for file, source in sources.items()
        for name in _definitions(source)
        if f"{module_name('', file)}.{name}".endswith(f".{where}")
    ]
    if not places:
        raise FaultError(f"{about}: there is no function or class {where!r}")
    if len(places) > 1:
        named = ", ".join(f"{module_name('', file)}.{name}".strip(".") for file, name in places)
        raise FaultError(f"{about}: {where!r} is ambiguous, it may be {named}")
    return places[0]
