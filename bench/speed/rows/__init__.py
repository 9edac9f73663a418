"""The rows, one subject a file. A module of this package with `ROWS` is part of the benchmark."""

from __future__ import annotations

import importlib
import pkgutil

from lyra.spec.errors import InputError

from ..row import Row


def all_rows() -> list[Row]:
    """Every row, by file and in the order in which a file has them."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return [row for module in modules for row in getattr(module, "ROWS", ())]


def chosen_rows(names: list[str] | None, quick: bool) -> list[Row]:
    """The rows whose names begin with one of `names`, or all; with `quick` those of the short report only.

    Raises InputError for a name that begins none.
    """
    rows = [row for row in all_rows() if row.quick or not quick]
    for name in names or ():
        if not name or not any(row.name.startswith(name) for row in rows):
            raise InputError(f"no row begins with {name!r}; there are {', '.join(row.name for row in rows)}")
    return [row for row in rows if not names or row.name.startswith(tuple(names))]
