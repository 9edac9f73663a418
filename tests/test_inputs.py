"""What may go into a call: completed, or refused with the shape expected and the shape got."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from small_layers import layer

from lyra.spec import (
    HeadSplit,
    InputError,
)
from lyra.spec.inputs import StaticLayer, check_call, check_length, check_rows, check_weights


def call(**changes: Any) -> Any:
    spec = changes.pop("spec", layer(split=HeadSplit((2, 3, 6, 7))))
    arguments = {
        "x": np.zeros((2, 3, 24), np.float32),
        "positions": np.arange(3)[None] + np.zeros((2, 1), int),
        "mask": None,
        "static": static(),
    }
    return check_call(spec, **(arguments | changes))


def static(**changes: Any) -> StaticLayer:
    kv = np.zeros((1, 2, 5, 6), np.float32)
    return StaticLayer(kv, kv.copy(), np.ones((1, 5), bool), np.arange(5)[None])._replace(**changes)


def hidden(value: float, slot: int, shown: bool) -> StaticLayer:
    k, mask = np.zeros((1, 2, 5, 6), np.float32), np.ones((1, 5), bool)
    k[0, 1, slot, 2], mask[0, slot] = value, shown
    return static(k=k, mask=mask)


def test_a_call_is_completed() -> None:
    found = call(x=np.zeros((2, 3, 24), np.float64))
    assert found.x.dtype == np.float32
    assert found.positions.dtype == np.int64
    assert found.mask.all()
    assert found.mask.shape == (2, 3)
    assert found.static is not None
    assert call(spec=layer(split=HeadSplit.none()), static=None).static is None
    assert call(static=hidden(1e30, 3, shown=False)).static is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": np.zeros((2, 24), np.float32)}, "x has shape (2, 24); expected [batch, tokens, 24]"),
        ({"x": np.zeros((2, 3, 24), int)}, "x has dtype int64"),
        ({"positions": np.zeros((2, 4), int)}, "positions has shape (2, 4)"),
        ({"positions": np.zeros((2, 3))}, "expected integers [2, 3]"),
        ({"mask": np.ones((2, 3), int)}, "expected bool [2, 3]"),
        ({"static": static(k=np.zeros((1, 3, 5, 6), np.float32))}, "must both be"),
        ({"static": static(k=np.zeros((1, 1, 5, 6)), v=np.zeros((1, 1, 5, 6)))}, "Lyra heads read 2: (1, 3)"),
        ({"static": static(k=np.zeros((1, 2, 5, 4)), v=np.zeros((1, 2, 5, 4)))}, "head_dim 4; the spec has 6"),
        ({"static": static(k=np.zeros((3, 2, 5, 6)), v=np.zeros((3, 2, 5, 6)))}, "batch 3; expected 1"),
        ({"static": static(mask=np.ones((1, 4), bool))}, "expected bool (1, 5)"),
        ({"static": static(positions=np.zeros((1, 5)))}, "expected integers (1, 5)"),
        ({"static": hidden(np.nan, 3, shown=True)}, "not finite in 1 visible slots, the first at row 0, token 3"),
        ({"static": hidden(np.inf, 2, shown=False)}, "fill them with any finite value"),
    ],
)
def test_a_call_that_contradicts_the_spec_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        call(**changes)
    assert words in str(caught.value)


def test_weights_are_checked() -> None:
    spec = layer()
    weights = {name: np.zeros(shape) for name, shape in spec.weight_shapes().items()}
    assert all(array.dtype == np.float32 for array in check_weights(spec, weights).values())
    with pytest.raises(InputError, match=r"missing \['q_norm.weight'\], not in the spec none"):
        check_weights(spec, {name: array for name, array in weights.items() if name != "q_norm.weight"})
    with pytest.raises(InputError, match=r"not in the spec \['q_proj.bias'\]"):
        check_weights(spec, weights | {"q_proj.bias": np.zeros(48)})
    with pytest.raises(InputError, match=r"\(24, 48\); the spec says \(48, 24\)"):
        check_weights(spec, weights | {"q_proj.weight": np.zeros((24, 48))})


@pytest.mark.parametrize("rows", [[1, 0, 1], (2,), np.array([0, 2], np.uint8)])
def test_rows_of_a_cache_may_be_repeated_and_left_out(rows: Any) -> None:
    assert check_rows(rows, 3).dtype == np.int64
    assert check_rows(rows, 3).tolist() == list(rows)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([0, 3], "rows are [0, 3]; the cache has rows 0 to 2"),
        ([-1, 0], "rows are [-1, 0]; the cache has rows 0 to 2"),
        ([0.5], "shape (1,) and dtype float64; give a list of integers"),
        ([True, False], "dtype bool"),
        ([[0, 1]], "shape (1, 2)"),
        (1, "shape ()"),
        (np.zeros(0, int), "shape (0,)"),
    ],
)
def test_rows_that_a_cache_does_not_have_are_refused(rows: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        check_rows(rows, 3)
    assert words in str(caught.value)


def test_a_cache_is_cropped_to_no_more_than_it_has() -> None:
    assert [check_length(length, 5) for length in (0, np.int32(3), 5)] == [0, 3, 5]
    for length in (-1, 6, 2.0, None):
        with pytest.raises(InputError, match=f"length is {length}; the cache holds 5 tokens, so give 0 to 5"):
            check_length(length, 5)  # type: ignore[arg-type]
