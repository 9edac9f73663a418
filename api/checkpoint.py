"""Finding a model: whatever the caller names becomes a folder in Hugging Face's layout."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import platformdirs

from lyra.backends.checkpoint import open_checkpoint
from lyra.spec.families import FAMILIES, family, titles
from lyra.spec.families.family import Packaged
from lyra.spec.files import folder_renamed_into
from lyra.spec.model import ModelSpec, presets

from .errors import CheckpointError

PACKAGED = {model.name: model for family in FAMILIES.values() for model in family.packaged}
"""The models whose weights can be installed, by name; the first is the one that is loaded where none is named."""
DEFAULT = next(iter(PACKAGED))
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ("*.json", "*.safetensors")


def resolve(model: str | os.PathLike[str] | None = None) -> Path:
    """The folder (config.json, *.safetensors, tokenizer.json) of a model.

    `model` is a local folder, a .gguf file (converted once, into the cache), "gemma-3-270m" (the weights of the extra
    gemma-270m) or a hub id. None means the environment variable LYRA_MODEL, else the extra. The cache is LYRA_CACHE,
    or else the user's cache folder. Raises CheckpointError, naming the choices where nothing was given.
    """
    if model is None:
        model = os.environ.get("LYRA_MODEL") or None
    if model is None:
        return _default_or_explain()
    if not isinstance(model, str | os.PathLike) or not os.fspath(model):
        raise CheckpointError(f"a model is named by a text or a path, got {model!r:.100}. {_choices()}")
    name = os.fspath(model)
    try:
        path = Path(model).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, TypeError) as error:  # a name too long, a home that is not there, a path of bytes
        raise CheckpointError(f"{name!r:.100} is no path ({error!s:.200}). {_choices()}") from None
    if is_folder:
        return check_folder(path)
    if is_file:
        return _converted(path)
    if name in PACKAGED:
        return _packaged(PACKAGED[name])
    if name in presets():
        raise CheckpointError(_no_weights(name))
    if HUB_ID.fullmatch(name):
        return check_folder(_from_hub(name))
    raise CheckpointError(f"there is no model {name!r:.200}. {_choices()}")


def cache_folder() -> Path:
    """Where converted checkpoints are kept: LYRA_CACHE, else the user's cache folder."""
    return Path(os.environ.get("LYRA_CACHE") or platformdirs.user_cache_dir("lyra"))


def check_folder(folder: Path) -> Path:
    """The folder, if it holds a model whose weights are those of its config. Raises CheckpointError."""
    return open_checkpoint(folder).folder


def _converted(path: Path) -> Path:
    from .gguf_file import MAGIC
    from .gguf_parts import parts_of

    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path} is no model: expected a .gguf file, or the folder that the file lies in")
        states = [_state(part) for part in parts_of(path)]
        digests = [_digest(part) for part in parts_of(path)]
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return _cached(path.stem, whole, lambda _: path, lambda: [_state(part) for part in parts_of(path)] == states)


def _state(path: Path) -> tuple[int, ...]:
    """What changes where a file is written to or replaced."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _default_or_explain() -> Path:
    if find_spec(PACKAGED[DEFAULT].package) is None:
        raise CheckpointError(f"nothing to load: no model was named and LYRA_MODEL is not set. {_choices()}")
    return _packaged(PACKAGED[DEFAULT])


def _packaged(model: Packaged) -> Path:
    if find_spec(model.package) is None:
        raise CheckpointError(f"{model.name!r} is not installed: {model.install}")
    package = import_module(model.package)
    return _cached(model.name, model.digest(package), lambda folder: model.file(package, folder))


def _no_weights(name: str) -> str:
    """Why a preset cannot be loaded by its name."""
    owner = ModelSpec.preset(name).family
    if owner is None:
        return f"{name!r} is known by its spec, for studies and splits; the models Lyra runs are {titles()}"
    can = ", ".join(f"{model.name!r} can be installed ({model.install})" for model in PACKAGED.values())
    return (
        f"{name!r} is known by its spec, but its weights do not come with Lyra: give a folder, a .gguf file or a hub "
        f"id such as {family(owner).hub_id.format(name)!r}; only {can}"
    )


def _choices() -> str:
    model = PACKAGED[DEFAULT]
    return (
        "Name one of: a folder in Hugging Face's layout; a .gguf file; a hub id such as 'google/gemma-3-270m'; "
        f"or {model.name!r}, whose weights come with {model.install}. LYRA_MODEL takes the same"
    )


def _cached(
    stem: str, digest: str, source: Callable[[Path], Path], unchanged: Callable[[], bool] = lambda: True
) -> Path:
    """The converted folder of a file with this hash, made now if need be: in a temporary folder, then renamed.

    What does not load is never kept: neither a new conversion, nor an old one that is damaged. Neither is what was made
    of another file than was hashed, because the file was not `unchanged` until the end.
    """
    from .gguf_convert import CONVERTER_VERSION, convert
    from .progress import steps

    folder, key = cache_folder() / "checkpoints", f"{digest[:16]}-v{CONVERTER_VERSION}"
    for found in sorted(folder.glob(f"*-{key}")):  # the same file under another name is the same model
        with suppress(CheckpointError):
            return check_folder(found)
        shutil.rmtree(found, ignore_errors=True)
    target = folder / f"{stem}-{key}"
    try:
        with (
            folder_renamed_into(target) as made,
            tempfile.TemporaryDirectory(dir=made) as work,
            steps(f"Converting {stem} (once)") as progress,
        ):
            file = source(Path(work))
            convert(file, made, progress)
            _check_converted(file, made)
            if not unchanged():
                raise CheckpointError(f"{file} was replaced while it was read; load it again")
    except OSError:
        if not target.is_dir():  # another process may have finished the same conversion first
            raise
    return check_folder(target)


def _check_converted(file: Path, made: Path) -> None:
    """The folder that was made of a file loads. Raises CheckpointError, which names the file."""
    from .text import Text

    try:
        check_folder(made)
        Text.from_folder(made)
    except CheckpointError as error:
        reason = str(error).replace(f"{made}/", "").replace(str(made), "the folder")
        raise CheckpointError(f"{file} does not become a model that loads: {reason}") from None


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError:
        raise CheckpointError(
            f"{name!r} is no local path; to fetch it from the hub: pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub raises many kinds; each means that the model cannot be had now
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name!r} is no local path, and the hub did not give it ({reason}); check the name, the network and "
            f"HF_HUB_OFFLINE, or name a local folder or .gguf file"
        ) from error
