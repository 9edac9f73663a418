"""What has been measured, kept in a file, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path

from lyra.spec.errors import InputError
from lyra.spec.files import write_atomically


class Memory:
    """Measured values by name, in a file where a path is given."""

    def __init__(self, path: Path | None = None) -> None:
        """The values in the file, if it is there, are taken over. Raises InputError where it is damaged."""
        self._path = path
        self._values: dict[str, list[float]] = _read(path) if path is not None and path.exists() else {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> list[float]:
        return self._values[name]

    def add(self, values: dict[str, list[float]]) -> None:
        """Remember more values, in the file too."""
        self._values |= values
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(self._values).encode())

    def forget(self) -> None:
        """Remove the file."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, list[float]]:
    try:
        return {
            str(name): [float(value) for value in row]
            for name, row in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no progress of choosing heads ({error}); remove it") from None
