"""What may go into a call of a whole model, checked once for every backend, in the same words. No numeric code."""

from __future__ import annotations

import math
import numbers
import os
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard, TypeVar

import numpy as np

from .errors import InputError

Kind = TypeVar("Kind")

LAST_POSITION = 131_072
"""The highest position that angles are right at for certain (clause ROPE-3)."""

SEEDS = 2**32
"""Seeds are below this."""

AT_ONCE = 1 << 30
"""More tokens than any text has: larger numbers stand for all of them, and need not fit into a framework's integers."""


def shown(value: Any) -> str:
    """A value as a message names it: in a few words, whatever it is."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"an array of shape {value.shape} and dtype {value.dtype}"
    return " ".join(reprlib.repr(value).split())


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def several(value: Any) -> tuple[Any, ...] | None:
    """What a list or another iterable holds; None for what is no list: a text, a mapping, an array without axes."""
    if isinstance(value, str | bytes | bytearray | Mapping) or not isinstance(value, Iterable):
        return None
    return None if getattr(value, "ndim", 1) == 0 else tuple(value)


def check_whole(name: str, value: Any, least: int, most: int | None = None, what: str = "a whole number") -> int:
    """A whole number from `least` to `most`, as an int. Raises InputError, `what` saying what was expected."""
    if not is_whole(value) or value < least or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise InputError(f"{name} is {shown(value)}; expected {what}, {limits}")
    return int(value)


def check_number(name: str, value: Any, what: str = "a finite number") -> float:
    """A finite number, as a float. Raises InputError, `what` saying what was expected."""
    if is_number(value):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise InputError(f"{name} is {shown(value)}; expected {what}")


def check_flag(name: str, value: Any) -> bool:
    """True or False. Raises InputError."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is {shown(value)}; expected True or False")
    return bool(value)


def check_callable(name: str, value: Any) -> None:
    """A function, or None. Raises InputError."""
    if value is not None and not callable(value):
        raise InputError(f"{name} is {shown(value)}; expected a function, or None")


def check_kind(name: str, value: Any, kind: type[Kind]) -> Kind:
    """An object of a class. Raises InputError."""
    if not isinstance(value, kind):
        raise InputError(f"{name} is {shown(value)}; expected a {kind.__name__}")
    return value


def check_kinds(name: str, values: Any, kind: type[Kind]) -> list[Kind]:
    """A list of objects of a class. Raises InputError."""
    found = several(values)
    if found is None:
        raise InputError(f"{name} is {shown(values)}; expected a list of {kind.__name__}s")
    return [check_kind(f"{name}[{number}]", value, kind) for number, value in enumerate(found)]


def check_mapping(name: str, value: Any) -> Mapping[Any, Any]:
    """A mapping, such as a dict. Raises InputError."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {shown(value)}; expected a mapping, such as a dict")
    return value


def check_choice(name: str, value: Any, known: Iterable[str]) -> str:
    """One of some names. Raises InputError."""
    known = tuple(known)
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name} is {shown(value)}; expected {listed(known)}")
    return str(value)


def check_text(name: str, value: Any) -> str:
    """A text that a tokenizer can read. Raises InputError for anything else, and for a text with half a character."""
    if not isinstance(value, str):
        raise InputError(f"{name} is {shown(value)}; expected a text (str)")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} holds {value[error.start]!r} at character {error.start}, half of a surrogate pair, which is no "
            f"text; decode the bytes that it comes from as UTF-8"
        ) from None
    return value


def check_path(name: str, value: Any, what: str = "a path (str or os.PathLike)") -> str:
    """The path of a file or folder. Raises InputError, `what` saying what was expected."""
    try:
        path = os.fspath(value)
        os.fsencode(path)
    except (TypeError, UnicodeEncodeError):
        path = None
    if not isinstance(path, str) or not path or "\0" in path:
        raise InputError(f"{name} is {shown(value)}; expected {what}")
    return path


def check_indices(name: str, value: Any) -> tuple[int, ...]:
    """Several whole numbers from 0 up, such as layers or heads, in the order given. Raises InputError."""
    found = several(value)
    if found is None:
        raise InputError(f"{name} is {shown(value)}; expected a list of whole numbers")
    wrong = [index for index in found if not is_whole(index) or index < 0]
    if wrong:
        raise InputError(f"{name} holds {shown(wrong[0])}; expected whole numbers from 0 up")
    return tuple(int(index) for index in found)


def check_ids(
    ids: Any, vocab_size: int, *, axes: tuple[int, ...] = (2,), least: int = 1, what: str = "whole numbers"
) -> np.ndarray:
    """Token ids, int64 [T] or [B,T] as `axes` allow, of at least `least` tokens. Raises InputError.

    `what` says what else the caller takes.
    """
    shapes = " or ".join({1: "[T]", 2: "[B,T]"}[count] for count in axes)
    wanted = f"{what} {shapes}, at least {least} token" + ("" if least == 1 else "s")
    found = as_array("ids", ids, f"{wanted}, all rows of one length")
    if found.dtype == object and found.size and all(is_whole(token) for token in found.flat):
        raise InputError(_outside(min(found.flat), max(found.flat), vocab_size))  # beyond 64 bits
    fits = found.ndim in axes and 0 not in found.shape and found.shape[-1] >= least
    if not fits or not np.issubdtype(found.dtype, np.integer) or _has_flags(ids):
        raise InputError(f"ids are {_described(ids, found)}; expected {wanted}")
    if found.min() < 0 or found.max() >= vocab_size:
        raise InputError(_outside(int(found.min()), int(found.max()), vocab_size))
    return found.astype(np.int64)


def check_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Which ids of a shape are no padding, bool [B,T]; all of them for None. One row may come as [T].

    Raises InputError.
    """
    if mask is None:
        return np.ones(shape, dtype=bool)
    found = as_array("mask", mask, f"True and False of shape {shape}")
    found = found[None] if found.ndim == 1 and shape[0] == 1 else found
    if found.shape != shape or found.dtype != np.bool_:
        raise InputError(f"mask has shape {found.shape} and dtype {found.dtype}; expected bool {shape}")
    return forwards(found)


def check_new_tokens(count: Any, tokens: int) -> int:
    """How many tokens to generate at most, behind a prompt of `tokens` tokens. Raises InputError."""
    count = check_whole("max_new_tokens", count, 0, what="how many tokens to generate at most, a whole number")
    room = max(0, LAST_POSITION + 1 - tokens)
    if count > room:
        raise InputError(
            f"max_new_tokens is {shown(count)}; behind a prompt of {tokens} tokens there are positions for {room} more "
            f"(clause ROPE-3)"
        )
    return count


def check_seed(seed: Any) -> int:
    """The seed of a generation. Raises InputError."""
    if not is_whole(seed) or not 0 <= seed < SEEDS:
        raise InputError(f"seed is {shown(seed)}; expected 0 to {SEEDS - 1}, a whole number")
    return int(seed)


def check_scored(shape: tuple[int, ...], scored: Any, layers: int) -> int:
    """How many of the last tokens of ids [1,T] are scored under blends of so many layers. Raises InputError."""
    rows, tokens = shape
    if rows != 1:
        raise InputError(f"blended: ids have {rows} rows; expected one")
    if not layers:
        raise InputError("blended: the context has no layer; there is nothing to choose heads for")
    return check_whole("scored", scored, 1, tokens - 1, "how many of the last tokens are scored")


class Generation(NamedTuple):
    """What a generation is asked for, checked."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    seed: int


def check_generation(
    tokens: int, max_new_tokens: Any, stop_ids: Any = (), seed: Any = 0, on_token: Any = None
) -> Generation:
    """What a generation behind a prompt of `tokens` tokens is asked for. Raises InputError."""
    check_callable("on_token", on_token)
    stops = tuple(stop for stop in check_indices("stop_ids", stop_ids) if stop < AT_ONCE)  # no vocabulary has others
    return Generation(check_new_tokens(max_new_tokens, tokens), stops, check_seed(seed))


def check_capture(rows: int, layers: Any, count: int, chunk_size: Any, on_chunk: Any) -> tuple[tuple[int, ...], int]:
    """The layers, of `count`, that are captured from ids of so many rows, and the tokens at once. Raises InputError."""
    if rows != 1:
        raise InputError(f"capture: ids have {rows} rows; a context is captured from one")
    check_callable("on_chunk", on_chunk)
    return check_layers("capture", layers, count), check_chunk_size(chunk_size)


def check_chunk_size(size: Any) -> int:
    """How many tokens of a text are captured at once. Raises InputError."""
    size = check_whole("chunk_size", size, 1, what="how many tokens are captured at once, a whole number")
    return min(size, AT_ONCE)


def check_layers(name: str, layers: Any, count: int) -> tuple[int, ...]:
    """Some layers of a model of `count` layers, in the order given. Raises InputError."""
    found = check_indices(f"{name}: layers", layers)
    outside = [layer for layer in found if layer >= count]
    if outside:
        raise InputError(f"{name}: there are no layers {outside}; the model has {count}")
    return found


def no_device(name: Any, framework: str, known: Iterable[str]) -> InputError:
    """The error of a device that a framework does not have."""
    return InputError(f"device is {shown(name)}; {framework} has {listed(known)} here")


def listed(names: Iterable[str]) -> str:
    """Names in quotes: 'a', 'b' or 'c'."""
    *first, last = (repr(name) for name in names)
    return f"{', '.join(first)} or {last}" if first else last


def as_array(name: str, values: Any, what: str) -> np.ndarray:
    """Values as an array. Raises InputError where they are none, as lists of different lengths are."""
    try:
        return np.asarray(values)
    except Exception:  # NumPy raises ValueError, and what other libraries' arrays raise: a tensor elsewhere, TypeError
        raise InputError(f"{name} {'are' if name == 'ids' else 'is'} {shown(values)}; expected {what}") from None


def forwards(array: np.ndarray) -> np.ndarray:
    """The same values in an array that runs forwards in memory: torch takes no view that runs backwards, x[:, ::-1]."""
    return np.ascontiguousarray(array) if min(array.strides, default=0) < 0 else array


def _described(values: Any, found: np.ndarray) -> str:
    """What was given in place of ids: the shape and type of an array or list, and what else there is as it is."""
    if found.ndim == 0:
        return shown(values)
    if _has_flags(values):
        return f"{shown(values)}, with True or False among them"
    return f"of shape {found.shape}" + (f" and dtype {found.dtype}" if found.size else "")


def _has_flags(ids: Any) -> bool:
    """Whether True or False stands among numbers in a list, which NumPy takes for 1 and 0."""
    rows = ids if isinstance(ids, list | tuple) else ()
    return any(isinstance(row, bool) or (isinstance(row, list | tuple) and _has_flags(row)) for row in rows)


def _outside(least: Any, most: Any, vocab_size: int) -> str:
    return f"ids range from {shown(least)} to {shown(most)}; the vocabulary has ids 0 to {vocab_size - 1}"
