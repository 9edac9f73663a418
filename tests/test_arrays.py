"""Whose memory is whose: backends keep no array of the caller's, and what they return is the caller's to write to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends_for_tests import Wrapped, WrappedAttention
from judging import judged

from lyra.backends.protocol import Result, get_backend
from lyra.conformance.case import Case, Context
from lyra.conformance.properties.test_arrays import ALIGNMENT, own
from lyra.spec.attention import AttentionSpec
from lyra.spec.split import HeadSplit

pytestmark = pytest.mark.usefixtures("empty_folder")

SPEC = AttentionSpec(
    hidden_size=16, num_attention_heads=4, num_key_value_heads=4, head_dim=4, scale=0.5,
    split=HeadSplit(lyra_q_heads=(1, 2)),
)  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("spec", [SPEC, SPEC.replace(rope=None, qk_norm=None)])
def test_a_trace_that_is_written_to_leaves_the_cache_alone(backend: str, spec: AttentionSpec) -> None:
    """Whichever stage the cache's keys come from."""
    pytest.importorskip(backend)
    problem = Case(spec, calls=(4, 1), context=Context(5)).problem()
    layer = get_backend(backend).attention(problem.spec, problem.weights)

    def last(spoilt: bool) -> np.ndarray:
        first = layer(problem.x[:, :4], positions=problem.positions[:, :4], static=problem.static, trace=True)
        for array in (first.output, *first.trace.values()):
            if spoilt and array.flags.writeable:
                array[...] = 7.0
        rest = {"positions": problem.positions[:, 4:], "static": problem.static}
        return layer(problem.x[:, 4:], cache=first.cache, **rest).output

    np.testing.assert_array_equal(last(spoilt=True), last(spoilt=False))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_token_that_is_written_to_is_not_what_comes_next(backend: str, tiny_engines: Any) -> None:
    """`on_token` is handed each new token; what it does to the array is its own affair."""
    engine, ids = tiny_engines[backend], np.array([[2, 5, 9]])
    wanted = engine.generate(ids, max_new_tokens=4)

    def spoil(token: np.ndarray) -> None:
        if token.flags.writeable:
            token[...] = 3

    np.testing.assert_array_equal(engine.generate(ids, max_new_tokens=4, on_token=spoil), wanted)


@pytest.fixture(scope="module")
def tiny_engines() -> dict[str, Any]:
    """The suite's small model in both frameworks."""
    from lyra.conformance.properties.models import small_folder

    return {name: get_backend(name).load(small_folder()) for name in ("torch", "jax")}  # type: ignore[attr-defined]


def test_arrays_of_ones_own_are_aligned() -> None:
    for shape, dtype in (((3, 5), np.float32), ((1, 7), bool), ((4,), np.int64)):
        array = np.ones(shape, dtype)
        copy = own(array)
        assert copy.ctypes.data % ALIGNMENT == 0
        assert copy.dtype == array.dtype
        np.testing.assert_array_equal(copy, array)


# in a run of the suite


class Remembering(WrappedAttention):
    """Keeps what it made of an argument, by the identity of its array."""

    def __init__(self, backend: Wrapped, layer: Any, what: str) -> None:
        super().__init__(backend, layer)
        self._what = what
        self._kept: dict[int, Any] = {}

    def __call__(self, x: np.ndarray, **rest: Any) -> Result:
        given = x if self._what == "x" else rest.get(self._what)
        if given is not None:
            _, kept = self._kept.setdefault(id(key(given)), (given, copy_of(given)))
            x, rest = (kept, rest) if self._what == "x" else (x, {**rest, self._what: kept})
        return super().__call__(x, **rest)


def key(given: Any) -> Any:
    return given.v if isinstance(given, tuple) else given


def copy_of(given: Any) -> Any:
    return given._make(part.copy() for part in given) if isinstance(given, tuple) else given.copy()


class RemembersOne(Wrapped):
    """Makes layers that remember."""

    def __init__(self, what: str) -> None:
        self.name = what

    def attention(self, spec: Any, weights: Any, **rest: Any) -> Any:
        """A layer that remembers one argument."""
        return Remembering(self, super().attention(spec, weights, **rest)._layer, self.name)


@pytest.mark.parametrize("what", ["x", "mask"])
def test_whatever_is_remembered_by_its_array_is_found(what: str) -> None:
    outcome = judged(RemembersOne(what), only="arrays_filled_anew_are_read", shrink=False)
    (failure,) = outcome.record.failures.values()
    assert (failure.kind, failure.property) == ("failed", "arrays::arrays_filled_anew_are_read_anew")


class WritesTo(Wrapped):
    """Writes to one of the arrays that it is given."""

    def __init__(self, what: str) -> None:
        self.name = what

    def attention(self, spec: Any, weights: Any, **rest: Any) -> Any:
        """A layer that writes."""
        layer, what = super().attention(spec, weights, **rest), self.name

        def call(x: np.ndarray, **rest: Any) -> Result:
            result = layer(x, **rest)
            written = {"x": x, "k": rest["static"].k, "positions": rest["positions"], "mask": rest["mask"]}[what]
            written[...] = ~written if written.dtype == bool else written + 1
            return result

        return call


@pytest.mark.parametrize(("what", "name"), [("k", "static k"), ("positions", "positions")])
def test_who_writes_to_what_it_was_given_is_told_which_array(what: str, name: str) -> None:
    outcome = judged(WritesTo(what), only="arrays_filled_anew_are_read", shrink=False)
    (failure,) = outcome.record.failures.values()
    assert failure.message == f"the call wrote to {name}, an array that it was given"
