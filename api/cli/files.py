"""The files of a command: what it will write is looked at before it works, and what it reads is not written over."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lyra.spec.errors import InputError
from lyra.spec.files import is_stream

STANDARD = Path("-")
"""What `--json` takes for standard output."""

OF_A_MODEL = ("*config.json", "*tokens*.json", "*.index.json", "tokenizer*", "*.safetensors", "*.gguf", "*template*")
"""The files of a folder that are its model's."""

Named = str | os.PathLike[str] | None


def check_files(
    *outputs: Path | None,
    json_path: Path | None = None,
    contexts: Sequence[Path] = (),
    inputs: Iterable[Named] = (),
    folders: Iterable[Named] = (),
) -> None:
    """Refuse before its work what a command could not write after it, or should not.

    `outputs`, `json_path` and `contexts` are files that are to be written, None where none is. `json_path` may be "-",
    and a context is written to no device or pipe. `inputs` are what the command reads: a file, a model's folder, or a
    name that is neither, such as a preset's. `folders` are to be filled. Files are told apart by what they are and not
    by their names: links and ways around are followed.

    Raises InputError for a folder in the place of a file, a folder that is not there or may not be written to, a file
    that is write-protected, an input, and a file that is named twice.
    """
    read = [file for source in inputs if source for file in _files_read(Path(source))]
    written: list[Path] = []
    for path in (*contexts, *outputs, None if json_path == STANDARD else json_path):
        if path is None:
            continue
        _guarded(_check_file, path)
        if path in contexts and is_stream(path):
            raise InputError(f"cannot write {str(path)!r}: a context is a file, and that is none; name one")
        if found := next((file for file in read if _same(path, file)), None):
            raise InputError(f"cannot write {_named(path, found)}: the command reads it; name another file")
        if found := next((file for file in written if _same(path, file)), None):
            raise InputError(f"cannot write {_named(path, found)}: two outputs would be one file; name another one")
        written.append(path)
    for folder in folders:
        if folder is not None:
            _guarded(_check_folder, Path(folder))


def _files_read(path: Path) -> list[Path]:
    """A file, or the files of a model's folder; nothing where there is neither."""
    with suppress(OSError, RuntimeError, ValueError):  # a name that no file can have: who reads it will say so
        path = path.expanduser()
        if path.is_dir():
            return [file for pattern in OF_A_MODEL for file in path.glob(pattern)]
        if path.exists():
            return [path]
    return []


def _same(first: Path, other: Path) -> bool:
    """Whether two names are of one file, which need not be there yet; some systems see no capitals in names."""
    if first.exists() and other.exists():
        return os.path.samefile(first, other)
    return os.path.realpath(first).casefold() == os.path.realpath(other).casefold()


def _guarded(check: Callable[[Path], str | None], path: Path) -> None:
    """Raise what a check finds wrong, and what the system says of a name that it cannot look up."""
    try:
        wrong = check(path)
    except (OSError, RuntimeError, ValueError) as error:
        wrong = getattr(error, "strerror", None) or str(error)
    if wrong is not None:
        raise InputError(f"cannot write {str(path)!r}: {wrong}")


def _check_file(path: Path) -> str | None:
    """What forbids to write a file, if anything."""
    if path.is_dir():
        return "it is a folder; name a file in it"
    if path.exists() and not os.access(path, os.W_OK):
        return "it is write-protected"
    if is_stream(path):
        return None  # a device, a pipe or an open file, which is written to as it is
    folder = Path(os.path.realpath(path)).parent
    if not folder.exists():
        return f"there is no folder {str(path.parent)!r}"
    if wrong := _check_folder(folder):
        return wrong
    with suppress(FileNotFoundError):
        os.lstat(folder / path.name)  # a name may be too long
    return None


def _check_folder(folder: Path) -> str | None:
    """What forbids to write files into a folder, which is made where it is not there; None if nothing does."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        return f"{str(there)!r} is a file and no folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"the folder {str(there)!r} is write-protected"
    return None


def _named(path: Path, other: Path) -> str:
    """What was given, and the other name of the same file where it has one."""
    return repr(str(path)) if str(path) == str(other) else f"{str(path)!r}, which is {str(other)!r}"
