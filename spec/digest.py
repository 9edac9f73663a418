"""What a context file says of itself, so that damage shows: a digest of each tensor, and one of everything else.

The digests are XXH3-128 (xxhash.com), in hexadecimal: they are formed at the speed at which memory is read. Whoever
changes a file on purpose can change its digest too; to know that a file is from whom it seems to be, sign it.

`digests` is JSON: by tensor that of its bytes, as they lie in the file (little-endian). `digest` is that of a JSON
text, `_described`, of the metadata without `digest` and of every tensor's dtype and shape. So an entry cannot stand for
another tensor's bytes, nor metadata for another file's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import ContextError
from .tensor_file import TensorFile, dtype_name, shown
from .text_file import parse_json

WHAT_TO_DO = "take another copy or capture the context again; verify=False loads what is there"


def sealed(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Metadata with `digests` and `digest` of these tensors, which are contiguous."""
    digests = {name: digest(tensor.reshape(-1).view(np.uint8).data) for name, tensor in sorted(tensors.items())}
    whole = {**metadata, "digests": json.dumps(digests)}
    layout = {name: (dtype_name(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    return {**whole, "digest": digest(_described(whole, layout))}


def check_header(file: TensorFile) -> None:
    """Refuse metadata and shapes that are not those that were saved. Raises ContextError."""
    metadata = {name: value for name, value in file.metadata.items() if name != "digest"}
    layout = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    said, found = file.metadata.get("digest"), digest(_described(metadata, layout))
    if said != found:
        raise ContextError(f"its header is damaged: its digest is {found}, and it says {shown(said)}; {WHAT_TO_DO}")


def check_tensors(file: TensorFile) -> None:
    """Refuse tensors whose bytes are not those that were saved, each read once. Raises ContextError, naming them."""
    said = parse_json(
        file.metadata.get("digests", ""), "the list of digests", refuse=ContextError, what="a digest by tensor"
    )
    if set(said) != set(file.entries):
        raise ContextError("the list of digests does not name the tensors that are there; the file is damaged")
    damaged = [name for name in file.entries if said[name] != digest(file.raw(name).data)]
    if damaged:
        raise ContextError(
            f"{len(damaged)} of {len(said)} tensors are damaged, the first being {shown(damaged[0])}: its digest is "
            f"not that of what was saved; {WHAT_TO_DO}"
        )


def digest(data: memoryview | bytes) -> str:
    """XXH3-128 of bytes, 32 hexadecimal digits."""
    import xxhash  # here, so that the spec alone needs NumPy and pydantic only

    return xxhash.xxh3_128_hexdigest(data)


def _described(metadata: Mapping[str, str], layout: Mapping[str, tuple[str, Sequence[int]]]) -> bytes:
    """The text that `digest` is of: JSON, ASCII, keys sorted, without spaces."""
    tensors: dict[str, Any] = {name: {"dtype": dtype, "shape": list(shape)} for name, (dtype, shape) in layout.items()}
    return json.dumps({"metadata": dict(metadata), "tensors": tensors}, sort_keys=True, separators=(",", ":")).encode()
