"""Which files of a folder are the model's weights: transformers' rule, in both backends.

model.safetensors, else the files that model.safetensors.index.json names. Whatever else lies in the folder (a context,
an adapter, another format's copy) is not read. A pickle is never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath

from lyra.spec.errors import CheckpointError
from lyra.spec.text_file import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that hold a model's weights, in the order of their names. Raises CheckpointError."""
    if (folder / WEIGHTS).is_file():
        return (folder / WEIGHTS,)
    if (folder / INDEX).is_file():
        return tuple(folder / name for name in sorted(set(weight_map(folder).values())))
    there = sorted(item.name for item in folder.glob("*.safetensors"))
    if there:
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}, only {', '.join(there[:3])}; name the file with the weights "
            f"{WEIGHTS}, or copy the index that belongs to them"
        )
    pickles = sorted(item.name for pattern in PICKLES for item in folder.glob(pattern))
    hint = f" (it holds {', '.join(pickles[:3])}: pickles may run code, and are not read)" if pickles else ""
    raise CheckpointError(f"{folder} has no *.safetensors{hint}; save the model again with safe_serialization=True")


def weight_map(folder: Path) -> Mapping[str, str]:
    """The file of every tensor, as the index says; each lies in the folder itself. Raises CheckpointError."""
    path = folder / INDEX
    try:
        found = read_json(path, refuse=CheckpointError, what="weight_map, the file of every tensor").get("weight_map")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path}: weight_map is {found!r:.100}; expected the file of every tensor")
    for tensor, name in found.items():
        where = f"{path}: weight_map puts {tensor!r:.100} into {name!r:.200}"
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{where}; expected a .safetensors file: no other kind is read, least of all a pickle"
            )
        if PurePath(name).name != name or "\\" in name or "\0" in name:
            raise CheckpointError(f"{where}; expected the name of a file in the folder itself")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; it is named in {INDEX}: copy or download it again")
    return found
