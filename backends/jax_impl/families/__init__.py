"""What a family needs of JAX, beyond what `lyra.spec.families` says: the module of its name holds it, as `FAMILY`."""

from __future__ import annotations

import importlib

from lyra.spec import families
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec

from .family import Family

__all__ = ["Family", "family", "of"]


def family(name: str) -> Family:
    """The family of a name of `lyra.spec.families`. Raises InputError where this backend does not run it."""
    try:
        found: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise InputError(f"the JAX backend does not run models of the family {name!r}") from None
    return found


def of(spec: ModelSpec) -> Family:
    """The family of a model. Raises SpecError for one of none, InputError for one that this backend does not run."""
    return family(families.of(spec).name)
