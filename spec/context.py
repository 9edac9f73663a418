"""StaticContext: keys and values of a text, captured once, for Lyra heads to attend to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from .arguments import (
    as_array,
    check_flag,
    check_indices,
    check_kind,
    check_kinds,
    check_mapping,
    check_path,
    check_whole,
)
from .bos import leading_bos
from .context_file import read_context, write_context
from .errors import ContextError
from .fingerprint import Fingerprint
from .inputs import StaticLayer
from .rotation import rotation_tables
from .storage import ContextLayer as ContextLayer
from .storage import (
    Storage,
    Values,
    check_storage,
    checked_values,
    frozen,
    infinite,
    joined,
    padded,
    stacked,
    storage_of,
    stored,
    widened,
)

MOST_POSITION = 1 << 30
"""The last position that a context may name: the live tokens behind it still have positions of 32 bits."""


@dataclass(frozen=True, eq=False)
class StaticContext:
    """Static keys and values of some layers and KV heads, with what is needed to move, compose and check them.

    layers       layer -> ContextLayer; k after k_norm and before RoPE (clause STORED)
    mask         [Bc,S] bool; False hides a slot
    positions    [Bc,S] int64, not negative; where the tokens sit
    tokens       [Bc,S] int64 token ids, or None where the context is not of text
    fingerprint  the model that it came from (clause FINGERPRINT)

    Bc is 1, or one row for each row of the batch it is attached for. Arrays are read-only. Raises ContextError for
    shapes that contradict each other or the fingerprint, for NaN or infinity in a visible slot, and for layers that are
    not all stored alike.
    """

    layers: Mapping[int, ContextLayer]
    mask: np.ndarray
    positions: np.ndarray
    fingerprint: Fingerprint
    tokens: np.ndarray | None = None

    def __post_init__(self) -> None:
        check_mapping("layers", self.layers)
        check_kind("fingerprint", self.fingerprint, Fingerprint)
        mask = as_array("mask", self.mask, "bool [batch, tokens]")
        if mask.ndim != 2 or mask.dtype != np.bool_:
            raise ContextError(f"mask has shape {mask.shape} and dtype {mask.dtype}; expected bool [batch, tokens]")
        if not self.layers:
            raise ContextError("the context holds no layer; capture at least one global layer")
        positions = _indices("positions", self.positions, mask.shape)
        if positions.size and positions.max() > MOST_POSITION:
            raise ContextError(f"positions reach {positions.max():,}; a context's end at {MOST_POSITION:,}")
        tokens = None if self.tokens is None else _indices("tokens", self.tokens, mask.shape)
        fields = {"mask": mask, "positions": positions, "tokens": tokens}
        for name, value in fields.items():
            object.__setattr__(self, name, None if value is None else frozen(value))
        known = dict(self.fingerprint.layers)
        layers = {
            number: _checked_layer(number, layer, mask, self.fingerprint, known)
            for number, layer in sorted(self.layers.items())
        }
        kinds = {storage_of(values) for layer in layers.values() for values in layer[1:]}
        if len(kinds) > 1:
            raise ContextError(f"keys and values are stored as {sorted(kinds)}; a context has one type, see astype()")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "fingerprint", self.fingerprint.restrict(layers))

    def __repr__(self) -> str:
        heads = {layer: item.kv_heads for layer, item in self.layers.items()}
        tokens = f"{self.num_tokens} tokens of {self.fingerprint.model!r}"
        kind = "" if self.dtype == "float32" else f", {self.dtype}"
        return f"StaticContext({tokens}, KV heads {heads}, batch {self.batch}{kind})"

    def __add__(self, other: StaticContext) -> StaticContext:
        return self.compose(other) if isinstance(other, StaticContext) else NotImplemented

    @property
    def batch(self) -> int:
        """Bc, the number of rows."""
        return len(self.mask)

    @property
    def num_tokens(self) -> int:
        """The number of visible tokens of the longest row."""
        return int(self.mask.sum(axis=1).max(initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values occupy, as they are stored."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers.values())

    @property
    def dtype(self) -> Storage:
        """What keys and values are stored as: "float32", "bfloat16" or "int8"."""
        return storage_of(next(iter(self.layers.values())).k)

    @property
    def kv_heads(self) -> dict[int, tuple[int, ...]]:
        """The KV heads held, by layer."""
        return {number: layer.kv_heads for number, layer in self.layers.items()}

    def describe(self) -> dict[str, Any]:
        """What is in it, as plain data."""
        return {
            "model": self.fingerprint.model,
            "batch": self.batch,
            "tokens": self.num_tokens,
            "slots": self.mask.shape[1],
            "next_position": int(self._next_position().max(initial=0)),
            "layers": {str(number): list(layer.kv_heads) for number, layer in self.layers.items()},
            "head_dim": self.fingerprint.attention.head_dim,
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "spec_version": self.fingerprint.spec_version,
        }

    def static_layer(self, layer: int, kv_heads: Sequence[int]) -> StaticLayer:
        """What a backend gets for one layer: the named KV heads, in ascending order (clause SPLIT-5), as float32.

        Heads that stand side by side in a float32 context are not copied. Raises ContextError where the context lacks
        the layer or a head.
        """
        _, k, v = self._heads(layer, kv_heads)
        return StaticLayer(widened(k), widened(v), self.mask, self.positions)

    def astype(self, dtype: str) -> Self:
        """The same context with keys and values stored as "float32", "bfloat16" or "int8" (clause STORED-4).

        Rounded to the nearest, ties to even; int8 with one scale for each channel of the keys and one for each token of
        the values. Masked slots become 0. To "float32" nothing is rounded. Raises ContextError for another type, and
        for a visible value too large for bfloat16.
        """
        kind = check_storage(dtype)
        layers = {
            number: ContextLayer(
                layer.kv_heads,
                stored(layer.k, kind, self.mask, by_channel=True),
                stored(layer.v, kind, self.mask, by_channel=False),
            )
            for number, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def check_holds(self, layer: int, kv_heads: Iterable[int]) -> ContextLayer:
        """The layer, which holds these KV heads. Raises ContextError where the context lacks it or a head."""
        layer, kv_heads = check_whole("layer", layer, 0), check_indices("kv_heads", kv_heads)
        if layer not in self.layers:
            raise ContextError(f"the context holds layers {list(self.layers)}, not {layer}; capture it again with it")
        held, wanted = self.layers[layer], tuple(sorted(set(kv_heads)))
        missing = [head for head in wanted if head not in held.kv_heads]
        if missing:
            raise ContextError(
                f"the context holds KV heads {held.kv_heads} of layer {layer}, not {missing}; capture it again with "
                f"kv_heads={wanted}, or choose a split whose Lyra heads read {held.kv_heads}"
            )
        return held

    def take(self, kv_heads: Mapping[int, Iterable[int]] | Iterable[int]) -> Self:
        """The same context with only some KV heads: the same ones for all layers, or by layer (others are left out)."""
        if not isinstance(kv_heads, Mapping):
            kv_heads = dict.fromkeys(self.layers, check_indices("kv_heads", kv_heads))
        layers = {number: self._heads(number, check_indices("kv_heads", heads)) for number, heads in kv_heads.items()}
        return replace(self, layers=layers)

    def moved(self, by: int) -> Self:
        """The same context `by` positions further on; keys do not change (clause STORED). Raises InputError."""
        by = check_whole("by", by, -MOST_POSITION, MOST_POSITION, "how many positions to move by, a whole number")
        return replace(self, positions=np.where(self.mask, self.positions + by, self.positions))

    def row(self, index: int) -> Self:
        """One row, without its masked slots. Raises ContextError where it is not there, InputError for no number."""
        if not 0 <= check_whole("index", index, -MOST_POSITION) < self.batch:
            raise ContextError(f"there is no row {index}; the context has {self.batch}")
        keep = self.mask[index]
        return replace(
            self,
            layers={
                number: ContextLayer(layer.kv_heads, *(values[index : index + 1, :, keep] for values in layer[1:]))
                for number, layer in self.layers.items()
            },
            mask=self.mask[index : index + 1, keep],
            positions=self.positions[index : index + 1, keep],
            tokens=None if self.tokens is None else self.tokens[index : index + 1, keep],
        )

    def compose(self, other: StaticContext) -> StaticContext:
        """This context, then the other one, moved to follow it; its leading BOS is dropped (clause COMPOSE).

        Either may have batch 1, which then serves every row of the other. Without token ids no BOS is known, and none
        is dropped. Raises ContextError for contexts of different models, layers, KV heads or batches; InputError for
        what is no context.
        """
        check_kind("other", other, StaticContext)
        self._check_alike(other)
        if self.batch != other.batch and 1 not in {self.batch, other.batch}:
            raise ContextError(f"cannot compose contexts of batch {self.batch} and {other.batch}; one must be 1")
        rows = range(max(self.batch, other.batch))
        return StaticContext.stack(
            [_concatenate(self.row(min(i, self.batch - 1)), other.row(min(i, other.batch - 1))) for i in rows]
        )

    @staticmethod
    def stack(contexts: Sequence[StaticContext]) -> StaticContext:
        """Contexts as the rows of one batch; shorter ones are padded with masked slots (clause BATCH-3).

        Raises ContextError for contexts of different models, layers or KV heads, InputError for what is no context.
        """
        contexts = check_kinds("contexts", contexts, StaticContext)
        if not contexts:
            raise ContextError("there is nothing to stack; give at least one context")
        first = contexts[0]
        for other in contexts[1:]:
            first._check_alike(other)
        length = max(context.mask.shape[1] for context in contexts)

        def rows(arrays: Iterable[np.ndarray]) -> np.ndarray:
            return np.concatenate([padded(array, 1, length) for array in arrays])

        tokens = [context.tokens for context in contexts if context.tokens is not None]
        return replace(
            first,
            layers={
                number: ContextLayer(
                    layer.kv_heads,
                    stacked([context.layers[number].k for context in contexts], length),
                    stacked([context.layers[number].v for context in contexts], length),
                )
                for number, layer in first.layers.items()
            },
            mask=rows(context.mask for context in contexts),
            positions=rows(context.positions for context in contexts),
            tokens=rows(tokens) if len(tokens) == len(contexts) else None,
        )

    def rotation(self) -> tuple[np.ndarray, np.ndarray] | None:
        """cos and sin [Bc,S,D] float32 of the positions; None for a model without RoPE (clause STORED-3)."""
        attention = self.fingerprint.attention
        return None if attention.rope is None else rotation_tables(self.positions, attention.rope, attention.head_dim)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one .safetensors file, through a temporary name, with digests of what it holds (clause STORED-6).

        An old file's mode is kept, else the umask decides; a symlink stays one. Raises OSError, naming `path`.
        """
        write_context(self, check_path("path", path))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = True) -> StaticContext:
        """Read a file that `save` wrote; arrays are memory-mapped.

        What is there is held to the file's digests, which reads it once, unless `verify` is False. A file of an older
        Lyra has none: an UncheckedContextWarning says so. Raises ContextError, naming the file and what is damaged.
        """
        return read_context(StaticContext, path, check_flag("verify", verify)).context

    def _heads(self, layer: int, kv_heads: Iterable[int]) -> ContextLayer:
        """Some KV heads of a layer, ascending, stored as they are. Raises ContextError where they are not there."""
        kv_heads = check_indices("kv_heads", kv_heads)
        held = self.check_holds(layer, kv_heads)
        wanted = tuple(sorted(set(kv_heads)))
        index = [held.kv_heads.index(head) for head in wanted]
        side_by_side = bool(index) and index == list(range(index[0], index[-1] + 1))
        chosen = slice(index[0], index[-1] + 1) if side_by_side else index
        return ContextLayer(wanted, held.k[:, chosen], held.v[:, chosen])

    def _next_position(self) -> np.ndarray:
        """P of every row, int [Bc]: one more than its highest visible position, 0 if none is visible."""
        highest: np.ndarray = np.where(self.mask, self.positions + 1, 0).max(axis=1, initial=0)
        return highest

    def _check_alike(self, other: StaticContext) -> None:
        found = self.fingerprint.differences(other.fingerprint)
        if self.kv_heads != other.kv_heads:
            found.append(f"KV heads by layer {self.kv_heads} against {other.kv_heads}; use take() to make them equal")
        if self.dtype != other.dtype:
            found.append(f"stored as {self.dtype} against {other.dtype}; use astype() to make them equal")
        if found:
            raise ContextError(f"these contexts do not go together: {'; '.join(found)}")


def _concatenate(first: StaticContext, second: StaticContext) -> StaticContext:
    """Two contexts of one row, all slots visible."""
    start = _leading_bos(second) if _leading_bos(first) else 0
    own = second.positions[:, start:]
    shifted = own - (own.min() if own.size else 0) + first._next_position()[:, None]
    tokens = None
    if first.tokens is not None and second.tokens is not None:
        tokens = np.concatenate([first.tokens, second.tokens[:, start:]], axis=1)
    return replace(
        first,
        layers={
            number: ContextLayer(
                layer.kv_heads,
                joined([layer.k, second.layers[number].k[:, :, start:]]),
                joined([layer.v, second.layers[number].v[:, :, start:]]),
            )
            for number, layer in first.layers.items()
        },
        mask=np.concatenate([first.mask, second.mask[:, start:]], axis=1),
        positions=np.concatenate([first.positions, shifted], axis=1),
        tokens=tokens,
    )


def _leading_bos(context: StaticContext) -> int:
    """How many BOS tokens a context of one row starts with; 0 where its tokens are not known."""
    return 0 if context.tokens is None else leading_bos(context.tokens[0].tolist(), context.fingerprint.bos)


def _indices(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    values = as_array(name, values, f"integers {shape}")
    if values.shape != shape or not np.issubdtype(values.dtype, np.integer):
        raise ContextError(f"{name} has shape {values.shape} and dtype {values.dtype}; expected integers {shape}")
    if values.size and values.min() < 0:
        raise ContextError(f"{name} has negative values, the lowest being {values.min()}; they start at 0")
    return values.astype(np.int64, copy=False)


def _checked_layer(
    number: int, layer: ContextLayer, mask: np.ndarray, fingerprint: Fingerprint, known: Mapping[int, str]
) -> ContextLayer:
    check_kind(f"layer {number}", layer, ContextLayer)
    attention = fingerprint.attention
    kv_heads = tuple(layer.kv_heads)
    if number not in known:
        raise ContextError(f"layer {number} is not in the fingerprint, which has layers {sorted(known)}")
    legal = range(attention.num_key_value_heads)
    if not kv_heads or list(kv_heads) != sorted(set(kv_heads)) or not set(kv_heads) <= set(legal):
        raise ContextError(
            f"layer {number} has KV heads {kv_heads}; expected some of 0 to {legal[-1]}, each once and ascending"
        )
    shape = (mask.shape[0], len(kv_heads), mask.shape[1], attention.head_dim)
    k = checked_values(f"layer {number} has k", layer.k, shape)
    v = checked_values(f"layer {number} has v", layer.v, shape)
    _check_finite(f"k of layer {number}", k, mask)
    _check_finite(f"v of layer {number}", v, mask)
    return ContextLayer(kv_heads, k, v)


def _check_finite(name: str, values: Values, mask: np.ndarray) -> None:
    bad = infinite(values)
    if not bad.any():
        return
    row, slot = np.argwhere(bad & mask if (bad & mask).any() else bad)[0]
    if mask[row, slot]:
        raise ContextError(
            f"{name} is not finite in {int((bad & mask).sum())} visible slots, the first at row {row}, token {slot}; "
            f"mask these slots or capture the context again"
        )
    raise ContextError(f"{name} is not finite in masked slot {slot} of row {row}; fill it with any finite value")
