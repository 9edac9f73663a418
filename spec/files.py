"""The one door through which files are written: whole or not at all, for the eyes that the old file was for."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_DESCRIPTOR = re.compile(r"(?:/proc/(?P<owner>[^/]+)(?:/task/[0-9]+)?|/dev)/fd/(?P<number>[0-9]+)")
"""What stands for a file that a process holds open: replaced, nobody would read what is written."""

_TEMPORARY = ".lyra-"
"""What stands in the name of a temporary file, between that of the file it becomes and twelve digits."""

_AS_IT_IS: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""To open what somebody else may have put there: no link is followed, no pipe waited for."""

_LONGEST = 200
"""Bytes of a file's name that its temporary file still carries; 255 is the most that file systems take."""


@contextmanager
def renamed_into(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed to it in the end, so that no reader ever sees half a file.

    What is written is on the disk before it is renamed. An old file's mode and group are kept, else the umask decides;
    until it is renamed, nobody else may read what replaces an old file. A symlink stays one: the file that it names is
    replaced. Temporary files for the same path whose process has ended are removed first.

    Raises OSError, which names `path` and the reason, and leaves nothing behind. A device, a pipe, a folder or a
    descriptor such as /dev/stdout is refused.
    """
    with _named(path):
        target = _target(path)
        old = target.stat() if target.exists() else None
        sweep(target)
        with _temporary(target, 0o666 if old is None else 0o600) as temporary:
            yield temporary
            _sync(temporary)
            if old is not None:
                _make_like(temporary, old)
            os.replace(temporary, target)
        _sync(target.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name and rename. What is no file, such as /dev/stdout, is written to. Raises OSError."""
    if is_stream(path):
        found = _descriptor(path)
        own = found is not None and found["owner"] in {None, "self", "thread-self", str(os.getpid())}
        with _named(path), open(os.dup(int(found["number"])) if found and own else path, "ab") as stream:
            stream.write(data)
        return
    with renamed_into(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def folder_renamed_into(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it in the end; otherwise like `renamed_into`.

    Folders above it are made. Raises OSError, also where `folder` is there in the end and not empty.
    """
    with _named(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with _temporary(folder, None) as temporary:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            os.replace(temporary, folder)
        _sync(folder.parent)


def sweep(target: Path) -> None:
    """Remove temporary files of `target` that no living process writes: each holds a lock for as long as it does."""
    pattern = re.compile(re.escape(_prefix(target.name)) + "[0-9a-f]{12}")
    with os.scandir(target.parent) as entries:
        found = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]
    for left in found:
        with suppress(OSError):  # another's, or gone meanwhile
            handle = os.open(left, os.O_RDONLY | _AS_IT_IS)
            try:
                if _lock(handle):
                    _remove(left)
            finally:
                os.close(handle)


@contextmanager
def _temporary(target: Path, mode: int | None) -> Iterator[Path]:
    """A new file beside `target`, or a folder without a mode, locked by this process; gone unless it was renamed."""
    path, handle = _create(target, mode)
    try:
        yield path
    finally:
        with suppress(FileNotFoundError):
            _remove(path)
        if handle is not None:
            os.close(handle)


def _create(target: Path, mode: int | None) -> tuple[Path, int | None]:
    while True:
        path = target.with_name(_prefix(target.name) + secrets.token_hex(6))
        if mode is None:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode))
        if sys.platform == "win32":  # there what is open cannot be renamed
            return path, None
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # a sweep of another process came between making and opening it
            continue
        if _lock(handle) is not False and path.exists():
            return path, handle
        os.close(handle)  # or between opening and locking it


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _prefix(name: str) -> str:
    plain = os.fsencode(name)
    return f".{name if len(plain) <= _LONGEST else hashlib.sha256(plain).hexdigest()}{_TEMPORARY}"


def _lock(handle: int) -> bool | None:
    """Whether the file is this process's now; False where another one holds it, None where none can be held."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nothing is ever swept there
        return None
    return True


def _target(path: Path) -> Path:
    """The file that is meant: where a symlink leads. Raises OSError for what is no file, and for links in a ring."""
    if is_stream(path):
        raise FileExistsError(f"{path} is there and is no file; give another name")
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


def is_stream(path: Path) -> bool:
    """Whether a path is there and is no regular file, or stands for a descriptor."""
    return (path.exists() and not path.is_file()) or _descriptor(path) is not None


def _descriptor(path: Path) -> re.Match[str] | None:
    """The descriptor that a path such as /dev/stdout stands for, which may be a file's: its owner and its number."""
    step = os.path.abspath(path)
    for _ in range(40):
        if found := _DESCRIPTOR.fullmatch(step):
            return found
        if not os.path.islink(step):
            break
        step = os.path.abspath(os.path.join(os.path.dirname(step), os.readlink(step)))
    return None


def _make_like(path: Path, old: os.stat_result) -> None:
    """Give a file the owner, group and mode of an old one; a group that cannot be kept has no rights to pass on."""
    mode = stat.S_IMODE(old.st_mode) & 0o777
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(path, old.st_uid, -1)
        try:
            os.chown(path, -1, old.st_gid)
        except OSError:
            mode &= ~0o070
    os.chmod(path, mode)


def _sync(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk. Raises OSError for a file, where a disk may be full."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # folders cannot be synced everywhere
        handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file that was asked for in an OSError that names none, or a temporary one."""
    try:
        yield
    except OSError as error:
        name = None if error.filename is None else os.fspath(error.filename)
        own = name is None or _TEMPORARY in os.path.basename(name) or name == os.path.dirname(os.path.realpath(path))
        if error.errno is None or not own:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
