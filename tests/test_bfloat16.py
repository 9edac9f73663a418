"""Clause DTYPE: rounding itself, the oracle against bfloat16 layers done naively, and what both backends keep."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from naive_layer import Naive
from test_oracle_sigma import LARGER, simulated, stages_of

from lyra.backends.jax_impl import dtype as jax_dtype
from lyra.backends.protocol import Bfloat16Backend, get_backend
from lyra.backends.torch_impl import dtype as torch_dtype
from lyra.conformance.case import Case, Context, Problem
from lyra.conformance.check import check_case
from lyra.conformance.report.data import limit
from lyra.conformance.subject import expected, stage_alone
from lyra.conformance.tolerance import K_PAIR, K, distance, stored_distance
from lyra.spec.bfloat16 import beyond, to_bfloat16
from lyra.spec.errors import InputError
from lyra.spec.split import HeadSplit
from lyra.spec.uncertain import Uncertain, exact, rounded

BACKENDS = ("torch", "jax")
HALF = 2.0**-8
"""Half the distance of two bfloat16 values above 1."""


def test_rounding_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=10_000).astype(np.float32) * 10.0 ** rng.integers(-30, 30, 10_000).astype(np.float32)
    ties = to_bfloat16(values[:1000]) * np.float32(1 + HALF)
    values = np.concatenate([values, ties, np.float32([0.0, -0.0, 1.0, 2.0, 3e38])])
    np.testing.assert_array_equal(to_bfloat16(values), torch.from_numpy(values).bfloat16().float().numpy())
    assert to_bfloat16(np.float32(1.1)).shape == ()


@pytest.mark.parametrize(
    ("number", "stored", "far"),
    [
        (1.0, 1.0, 0.0),
        (1.0 + HALF, 1.0, 0.0),
        (1.0 + 1.5 * HALF, 1.0, 0.5 * HALF),
        (1.0 - 0.5 * HALF, 1.0, 0.0),
        (1.0 - HALF, 1.0, 0.5 * HALF),
        (-1.0 - 2 * HALF, -1.0, HALF),
        (1.5 - 1.25 * HALF, 1.5, 0.25 * HALF),
        (0.0, 0.0, 0.0),
        (1e-30, 0.0, 1e-30),
        (1.0, 1.0 + HALF, np.inf),
        (1.0, np.inf, np.inf),
        (1.0, np.nan, np.inf),
    ],
)
def test_what_rounds_to_a_value_is_an_interval(number: float, stored: float, far: float) -> None:
    assert beyond(np.float64(number), np.float32(stored)) == pytest.approx(far, rel=1e-12)


def test_a_value_near_the_middle_of_two_may_be_either() -> None:
    found = rounded(Uncertain(np.array([1.5 + 0.9 * HALF, 1.5 + HALF]), np.array([1e-6, 1e-6]) ** 2))
    np.testing.assert_array_equal(found.value, [1.5, 1.5])
    np.testing.assert_allclose(found.sigma, [0.0, 2 * HALF])


class Narrow(Naive):
    """The same layer in bfloat16: Lyra heads at P + t, where both backends turn static keys to j - P instead."""

    def linear(self, x: np.ndarray, kind: str) -> np.ndarray:
        """x [..., n] by W [m, n]."""
        return to_bfloat16(super().linear(x, kind))

    def norm(self, y: np.ndarray, kind: str) -> np.ndarray:
        """RMSNorm in float32, rounded."""
        return to_bfloat16(super().norm(y, kind))

    def turn(self, y: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Turned in float32, rounded."""
        return to_bfloat16(super().turn(y, positions))

    def head(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, h: int) -> np.ndarray:
        """One head, rounded."""
        return to_bfloat16(super().head(q, k, v, h))


def narrow(index: int) -> Problem:
    return simulated(index).replace(dtype="bfloat16").rounded()


def test_naive_bfloat16_layers_are_within_the_tolerance() -> None:
    """By themselves within float32's σ after undoing one rounding; chained, of the size of σ and far below K."""
    chained, alone, other_form = defaultdict(list), defaultdict(list), []
    for index in range(60):
        problem = narrow(index)
        trace = Narrow(problem, np.random.default_rng(index)).stages()
        whole = stages_of(problem)
        for name, value in trace.items():
            chained[name].append(distance(value, whole[name]).ratio)
            alone[name].append(stored_distance(value, stage_alone(problem, name, trace, moved=False)).ratio)
        if problem.spec.rope is not None and problem.spec.lyra_q_heads:
            other_form.append(stored_distance(trace["heads"], stage_alone(problem, "heads", trace)).ratio)
    assert set(chained) == set(LARGER.trace_names())
    assert all(max(ratios) < K for ratios in alone.values()), {name: max(ratios) for name, ratios in alone.items()}
    assert all(1 < max(ratios) < K for ratios in chained.values()), {name: max(r) for name, r in chained.items()}
    assert np.median(other_form) > 100 * K  # so the form matters, and a judge has to know both


@pytest.mark.parametrize("stage", ["q_norm", "k_rope", "heads", "output"])
def test_a_second_rounding_is_seen_in_a_stage_and_not_in_the_output(stage: str) -> None:
    """One bit more or less: nothing against σ of the whole layer, far too much for a stage by itself."""
    problem = narrow(6)
    trace = Narrow(problem, np.random.default_rng(0)).stages()
    trace[stage] = to_bfloat16(trace[stage] * np.float32(1 + HALF))
    assert distance(trace[stage], stages_of(problem)[stage]).ratio < K
    assert stored_distance(trace[stage], stage_alone(problem, stage, trace, moved=False)).ratio > 100 * K


def test_what_is_no_bfloat16_is_infinitely_far() -> None:
    one = np.ones((1, 1, 1), np.float32)
    assert stored_distance(one + np.float32(2**-20), exact(one)).ratio == np.inf
    assert stored_distance(one, exact(one)).ratio == 0.0
    with pytest.raises(ValueError, match="shape"):
        stored_distance(one, exact(np.ones(3)))


def a_case() -> Case:
    spec = LARGER.replace(split=HeadSplit.last_kv(LARGER, 1))
    return Case(spec, calls=(4, 2), context=Context(5), seed=3, dtype="bfloat16")


def test_the_oracle_rounds_what_comes_in_as_a_layer_does() -> None:
    rounded_before = a_case().problem()
    fine = a_case().replace(dtype="float32").problem().replace(dtype="bfloat16")
    assert (fine.x != rounded_before.x).any()
    for name, wanted in expected(rounded_before).items():
        np.testing.assert_array_equal(expected(fine)[name].value, wanted.value)
    trace = {name: to_bfloat16(stage.value) for name, stage in expected(fine).items()}
    for name in trace:
        alone, wanted = (stage_alone(problem, name, trace) for problem in (fine, rounded_before))
        np.testing.assert_array_equal(alone.value, wanted.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_is_the_same_in_every_range(backend: str) -> None:
    """From the smallest normal numbers to the largest, as a stage of either backend rounds what it has made."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=10_000).astype(np.float32) * 2.0 ** rng.integers(-120, 125, 10_000).astype(np.float32)
    if backend == "torch":
        found = torch_dtype.store(torch.from_numpy(values), torch.bfloat16).float().numpy()
    else:
        found = np.asarray(jax_dtype.store(jnp.asarray(values), jax_dtype.DTYPES["bfloat16"])).astype(np.float32)
    np.testing.assert_array_equal(found, to_bfloat16(values))


def layer(backend: str, problem: Problem) -> Any:
    made = cast(Bfloat16Backend, get_backend(backend))
    return made.attention(problem.spec, problem.weights, dtype=problem.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_and_weights_take_half_the_memory(backend: str) -> None:
    problem = a_case().problem()
    kept = {}
    for dtype in ("bfloat16", "float32"):
        made = layer(backend, problem.replace(dtype=dtype))
        cache = made(problem.x, positions=problem.positions, static=problem.static).cache
        weights = made.weights if backend == "torch" else made._weights
        kept[dtype] = [cache[0].nbytes, cache[1].nbytes, *(weights[name].nbytes for name in problem.weights)]
    assert [2 * size for size in kept["bfloat16"]] == kept["float32"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_of_the_other_type_is_refused(backend: str, dtype: str) -> None:
    problem = a_case().problem()
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    first = layer(backend, problem.replace(dtype=other))(problem.x[:, :4], positions=problem.positions[:, :4])
    with pytest.raises(InputError, match=f"not that of a {dtype} layer"):
        layer(backend, problem.replace(dtype=dtype))(
            problem.x[:, 4:], positions=problem.positions[:, 4:], cache=first.cache
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_refused_with_what_to_do(backend: str) -> None:
    problem = a_case().problem()
    with pytest.raises(InputError, match="no gradients; make one with dtype='float32'"):
        layer(backend, problem).vjp(problem.x, problem.x, positions=problem.positions)


def test_static_keys_and_values_are_kept_in_bfloat16() -> None:
    from lyra.backends.jax_impl import static as jax_static
    from lyra.backends.jax_impl.dtype import DTYPES
    from lyra.backends.jax_impl.rope import inverse_frequencies
    from lyra.backends.torch_impl.static import place_static, rotate_static

    problem = a_case().problem()
    assert problem.static is not None
    entered = place_static(problem.spec, problem.static, torch.bfloat16)
    assert entered is not None
    mine = rotate_static(entered, None)
    assert (mine.keys.dtype, mine.values.dtype) == (torch.bfloat16, torch.bfloat16)
    placed = jax_static.place_static(problem.spec, problem.static, DTYPES["bfloat16"])
    assert placed is not None
    turned = jax_static.rotate_static(placed, inverse_frequencies(problem.spec))
    assert (turned.keys.dtype, turned.values.dtype) == (DTYPES["bfloat16"], DTYPES["bfloat16"])


def test_bfloat16_compiles_beside_float32_and_not_again() -> None:
    from lyra.backends.jax_impl.attention_backend import call_layer

    problem = a_case().problem().replace(static=None)
    wide, small = (layer("jax", problem.replace(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    first = wide(problem.x, positions=problem.positions).output
    before = call_layer._cache_size()
    small(problem.x, positions=problem.positions)
    assert call_layer._cache_size() == before + 1
    np.testing.assert_array_equal(wide(problem.x, positions=problem.positions).output, first)
    small(problem.x + 1, positions=problem.positions)
    assert call_layer._cache_size() == before + 1


def test_a_case_knows_its_dtype() -> None:
    case = a_case()
    assert Case.from_json(case.to_json()) == case
    assert case.describe().endswith("in bfloat16")
    assert Case.from_json(case.to_json().replace(', "dtype": "bfloat16"', "")).dtype == "float32"
    problem = case.problem()
    for array in (problem.x, problem.static.k, problem.static.v, *problem.weights.values()):  # type: ignore[union-attr]
        np.testing.assert_array_equal(array, to_bfloat16(array))
    wide = case.replace(dtype="float32").problem()
    np.testing.assert_array_equal(problem.x, to_bfloat16(wide.x))
    assert (problem.x != wide.x).any()


def test_a_case_in_bfloat16_is_checked_and_reported_apart() -> None:
    found = check_case(a_case(), backends=["torch"])
    assert 0 < found.largest["torch"] < K
    assert limit("torch", "output, bfloat16") == limit("torch", "heads alone, bfloat16") == K
    assert limit("torch ↔ jax", "output, bfloat16") == K_PAIR
