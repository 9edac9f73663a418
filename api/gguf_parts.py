"""A .gguf model that may be split into several files: `model-00001-of-00003.gguf` and so on, read as one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError
from .gguf_file import GGUFFile, TensorInfo

PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""What the parts of a split file are called; numbers start at 1."""


class GGUFModel:
    """All parts of a model: the metadata of the first, the tensors of all. `path` is the file that was named."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def __init__(self, path: Path) -> None:
        """Read every part's header. Raises CheckpointError for parts that are missing, damaged or another model's."""
        self.path = path
        self._parts = [GGUFFile(part) for part in parts_of(path)]
        self.metadata, self.tensors = self._parts[0].metadata, {}
        self._owners: dict[str, GGUFFile] = {}
        for number, part in enumerate(self._parts):
            self._check_part(part, number)
            for name, info in part.tensors.items():
                if name in self._owners:
                    raise CheckpointError(f"{part.path}: tensor {name!r:.100} is in {self._owners[name].path.name} too")
                self.tensors[name], self._owners[name] = info, part
        total = self.metadata.get("split.tensors.count", len(self.tensors))
        if type(total) is not int or total != len(self.tensors):
            raise CheckpointError(
                f"{path}: split.tensors.count is {total!r:.100}, and its {len(self._parts)} parts hold "
                f"{len(self.tensors)}; download them again"
            )

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The tensor's rows, as `GGUFFile.blocks` gives them."""
        return self._owners[name].blocks(name)

    def _check_part(self, part: GGUFFile, number: int) -> None:
        """The file says of itself what its name says. Raises CheckpointError."""
        count, own = part.metadata.get("split.count", 1), part.metadata.get("split.no", number)
        if type(count) is not int or type(own) is not int:
            raise CheckpointError(f"{part.path}: split.no or split.count is no number: {own!r:.100}, {count!r:.100}")
        if (count, own) == (len(self._parts), number):
            return
        if len(self._parts) == 1:
            raise CheckpointError(
                f"{part.path} is one of {count:,} parts of a split model; expected a name that ends in "
                f"-{own + 1:05}-of-{count:05}.gguf, and the other parts beside it"
            )
        raise CheckpointError(
            f"{part.path}: split.no is {own} and split.count {count}; expected {number} and {len(self._parts)}, as in "
            f"its name"
        )


def parts_of(path: Path) -> tuple[Path, ...]:
    """The files of the model that a file belongs to, in order: itself, unless its name says that it is a part.

    Raises CheckpointError, naming the parts that are missing.
    """
    found = PART.fullmatch(path.name)
    if found is None:
        return (path,)
    number, count = int(found["number"]), int(found["count"])
    if not 1 <= number <= count:
        raise CheckpointError(f"{path.name} is called part {number} of {count}; expected 1 to {count}")
    there = {item.name for item in path.parent.glob("*.gguf") if item.is_file()}
    names = [f"{found['stem']}-{index:05}-of-{count:05}.gguf" for index in range(1, count + 1)]
    missing = [name for name in names if name not in there]
    if missing:
        raise CheckpointError(
            f"{path} is one of {count} parts, and {len(missing)} are missing beside it: {', '.join(missing[:3])}; "
            f"download them into the same folder"
        )
    return tuple(path.with_name(name) for name in names)
