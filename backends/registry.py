"""How a backend is found by name, made and looked at. Whatever its code does meanwhile becomes one line of ours."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, NoReturn

from .raised import ends_the_process, interrupted, interrupts_watched, last_frame, raised

if TYPE_CHECKING:
    from .protocol import Backend

ENTRY_POINTS = "lyra.backends"
SUBJECTS = "lyra.subjects"
"""Entry points of what can be judged by name too, and is where it is named only: modules that ship in a backend."""

CAPABILITIES = {
    "static": "attends to a static context",
    "cache": "continues from the cache an earlier call returned",
    "trace": "returns the value of every stage",
    "reorder": "Attention.reorder(cache, rows) selects rows of a live cache",
    "crop": "Attention.crop(cache, length) keeps the first tokens of a live cache",
    "grad": "Attention.vjp",
    "bfloat16": "Attention computes in bfloat16 when the backend is given dtype='bfloat16'",
    "sequential": "SequentialBackend.sequential: an injected attention block after self-attention",
    "mesh": "MeshBackend.load spreads a whole model over the devices of a mesh",
    "inject": "its engines are SequentialEngines: whole models with injected blocks",
    "blends": "its engines are BlendedEngines: a text behind a context, scored under blends of heads",
    "gates": "another name of blends",
}
OTHER_NAMES = {"blends": "gates"}
"""What a capability may be called too."""

PAIR = "↔"
"""Stands between the names of two backends that are compared, so that no name may have it."""

LONGEST_NAME = 60

OWN = "package.module:Class"
NAMED = re.compile(r"\w+(?:\.\w+)*:\w+(?:\.\w+)*")


class BackendNotFound(LookupError):
    """No backend of that name, or none that can be made; the message says why, or lists the known ones."""


class BackendEnded(BackendNotFound):
    """A backend tried to end the process while it was loaded."""


def is_able(backend: Backend, capability: str) -> bool:
    """Whether a backend claims a capability, by any of its names."""
    return bool({capability, OTHER_NAMES.get(capability, capability)} & set(backend.capabilities))


def known_backends() -> dict[str, EntryPoint]:
    """Every installed backend by name, not imported yet."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def known_subjects() -> dict[str, EntryPoint]:
    """Every installed subject by name, not imported yet: what is judged where it is asked for, and not by default."""
    return {point.name: point for point in entry_points(group=SUBJECTS)}


def get_backend(name: str) -> Backend:
    """The backend of an entry point's name or of `package.module:Class`, made by calling it without arguments.

    Raises BackendNotFound for an unknown name and for one whose module or class does not give a backend, with the last
    line of it that ran; BackendEnded where it tries to end the process; ImportError, naming the extra, where its
    framework is missing.
    """
    point = _point(name)
    package = point.value.partition(":")[0]
    with interrupts_watched():
        try:
            module = importlib.import_module(package)
        except BaseException as error:
            _refuse_module(name, package, error)
        try:
            made: Any = module
            for attribute in point.value.partition(":")[2].split("."):
                made = getattr(made, attribute)
        except AttributeError:
            classes = [kind for kind, value in vars(module).items() if isinstance(value, type) and kind[:1] != "_"]
            hint = f"; it has {', '.join(classes[:8])}" if classes else ""
            raise BackendNotFound(
                f"backend {name!r}: module {package!r} has no {point.value.partition(':')[2]!r}{hint}"
            ) from None
        except BaseException as error:
            _refuse(f"backend {name!r}", package, "cannot be looked up", error)
        _check_callable(name, made)
        try:
            backend = made()
        except BaseException as error:
            _refuse(f"backend {name!r}", package, "cannot be made", error)
        return _checked(backend, f"backend {name!r}", package)


def check_backend(made: Any) -> Backend:
    """A backend, once it is known to be one. Raises BackendNotFound, saying what is missing or odd."""
    return _checked(made, _kind(made), type(made).__module__)


def _point(name: str) -> EntryPoint:
    """Where a name leads. Raises BackendNotFound."""
    if not isinstance(name, str):
        raise BackendNotFound(f"a backend goes by its name, not by an object of type {type(name).__name__}")
    points = known_backends() | known_subjects()
    if name in points:
        return points[name]
    if ":" not in name:
        raise BackendNotFound(
            f"unknown backend {name!r}; known: {', '.join(sorted(known_backends())) or 'none'}, "
            f"and to the suite {', '.join(sorted(known_subjects())) or 'none'}. "
            f"A backend of your own goes by {OWN!r}"
        )
    if not NAMED.fullmatch(name) or name.partition(":")[0].endswith(".py"):
        raise BackendNotFound(f"backend {name!r}: write {OWN!r}, the module as an import names it and the class in it")
    return EntryPoint(name=name, value=name, group=ENTRY_POINTS)


def _refuse_module(name: str, package: str, error: BaseException) -> NoReturn:
    """Say why a backend's module cannot be imported."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        if error.name == package or package.startswith(f"{error.name}."):
            raise BackendNotFound(
                f"backend {name!r}: no module {error.name!r}; PYTHONPATH names folders to look in"
            ) from error
        if package.startswith("lyra.") and not error.name.startswith("lyra"):
            extra = name.removesuffix("-module")  # a subject's framework is its backend's
            raise ImportError(
                f"backend {name!r} needs {error.name!r}, which is not installed: pip install 'lyra[{extra}]'",
                name=error.name,
            ) from error
    _refuse(f"backend {name!r}", package, "cannot be imported", error)


def _refuse(owner: str, package: str, what: str, error: BaseException) -> NoReturn:
    """Say what a backend's own code raised, and where. The user's Ctrl-C passes."""
    if interrupted(error):
        raise error
    said = f"{owner} {what}: {raised(error)} ({last_frame(error, package)})"
    if ends_the_process(error):
        raise BackendEnded(f"{said}: it tries to end the process") from error
    if isinstance(error, ImportError):
        raise ImportError(said, name=error.name) from error
    raise BackendNotFound(said) from error


def _check_callable(name: str, made: Any) -> None:
    """Refuse what cannot be called without arguments. Raises BackendNotFound."""
    if not callable(made):
        raise BackendNotFound(
            f"backend {name!r} is {_kind(made)} and no class; name a class, or a function that makes a backend"
        )
    try:
        signature = inspect.signature(made)
    except (TypeError, ValueError):  # of some built-in classes nothing is known
        return
    needed = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise BackendNotFound(
            f"backend {name!r} needs arguments ({', '.join(needed)}), but is made by calling it without any; give them "
            f"defaults, or name a function that passes them"
        )


def _checked(made: Any, owner: str, package: str) -> Backend:
    """A backend whose name, capabilities and attention are what they must be."""
    if isinstance(made, type):
        raise BackendNotFound(f"{owner} is a class and no backend: give an object of it, {made.__name__}()")
    found, missing = {}, []
    for part in ("name", "capabilities", "attention"):
        try:
            found[part] = getattr(made, part)
        except AttributeError:
            missing.append(part)
        except BaseException as error:
            _refuse(owner, package, f"does not give its {part}", error)
    if missing:
        raise BackendNotFound(f"{_kind(made)} is no backend: it lacks {', '.join(missing)}")
    name, capabilities = found["name"], found["capabilities"]
    if not (isinstance(name, str) and name.isprintable() and 0 < len(name) <= LONGEST_NAME and name == name.strip()):
        raise BackendNotFound(
            f"{owner}: its name is {name!r:.100}; expected a text of one line, at most {LONGEST_NAME} characters"
        )
    if PAIR in name:
        raise BackendNotFound(f"{owner}: its name {name!r} holds {PAIR!r}, which stands between two backends")
    if isinstance(capabilities, str | bytes) or not isinstance(capabilities, Collection):
        raise BackendNotFound(
            f"{owner}: its capabilities are {capabilities!r:.100}; expected a set of names, of {list(CAPABILITIES)}"
        )
    odd = [
        capability for capability in capabilities if not (isinstance(capability, str) and capability in CAPABILITIES)
    ]
    if odd:
        raise BackendNotFound(
            f"backend {name!r} claims unknown capabilities {sorted(map(str, odd))[:8]}; known: {list(CAPABILITIES)}"
        )
    if not callable(found["attention"]):
        raise BackendNotFound(f"{owner}: its attention is {_kind(found['attention'])}; expected a method")
    backend: Backend = made
    return backend


def _kind(made: Any) -> str:
    """What something is, in a word."""
    return f"the class {made.__name__}" if isinstance(made, type) else f"{type(made).__name__}"


def import_extra(module: str, extra: str) -> Any:
    """Import an optional package, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"this needs {module!r}, which is not installed: pip install 'lyra[{extra}]'") from error
