"""The oracle's σ against float32 computations done naively: of the size of their rounding, and of no more."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from naive_layer import FLOAT, Naive

from lyra.conformance.case import FLAVOURS, Case, Context, Problem
from lyra.conformance.tolerance import K, distance
from lyra.spec.attention import AttentionSpec, RopeSpec
from lyra.spec.reference import reference, stage_from_trace
from lyra.spec.split import HeadSplit
from lyra.spec.uncertain import exact, linear


def stages_of(problem: Problem) -> dict:
    return reference(
        problem.spec,
        problem.weights,
        problem.x,
        positions=problem.positions,
        mask=problem.mask,
        static=problem.static,
        dtype=problem.dtype,
    )


LARGER = AttentionSpec(64, 4, 2, 32, 32**-0.5)
STRUCTURES = {
    "plain": {},
    "no norm": {"qk_norm": None, "scale": 1 / 32},
    "no rope": {"rope": None},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "low theta": {"rope": RopeSpec(theta=1e4, factor=8.0)},
}
SIMULATIONS = 240


def simulated(index: int) -> Problem:
    """The index walks through structures, flavours, splits and positions."""
    spec = LARGER.replace(**list(STRUCTURES.values())[index % len(STRUCTURES)])
    split = ((), (2, 3), (0, 3), (0, 1, 2, 3))[index // 3 % 4]
    spec = spec.replace(split=HeadSplit.from_q_heads(spec, split, share_kv=None))
    flavour = list(FLAVOURS)[index // 7 % len(FLAVOURS)]
    far = (0, 100, 100_000)[index // 2 % 3]
    return Case(
        spec, calls=(6,), batch=1, context=Context(9, start=far, hidden=(2,)), start=far, flavour=flavour, seed=index
    ).problem()


def test_sigma_is_of_the_size_of_float32_rounding() -> None:
    """Of a few hundred correct float32 layers, no value at any stage is K·σ off, and the farthest is beyond σ/2."""
    chained, alone = defaultdict(list), defaultdict(list)
    for index in range(SIMULATIONS):
        problem = simulated(index)
        trace = Naive(problem, np.random.default_rng(index)).stages()
        whole = stages_of(problem)
        assert set(trace) == set(whole)
        for name, value in trace.items():
            assert value.dtype == FLOAT
            chained[name].append(distance(value, whole[name]).ratio)
            one = stage_from_trace(
                problem.spec,
                problem.weights,
                name,
                trace,
                problem.x,
                positions=problem.positions,
                static=problem.static,
            )
            alone[name].append(distance(value, one).ratio)
    for ratios in (chained, alone):
        assert set(ratios) == set(LARGER.trace_names())
        largest = {name: max(values) for name, values in ratios.items()}
        assert all(0.5 < value < K for value in largest.values()), largest
        typical = {name: float(np.median(values)) for name, values in ratios.items()}
        assert all(0.3 < value < 4 for value in typical.values()), typical


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        ("q_proj", lambda y: y * FLOAT(1 + 2**-16)),
        ("q_norm", lambda y: y.astype(np.float16).astype(FLOAT)),
        ("k_rope", lambda y: y + FLOAT(2e-5)),
        ("heads", lambda y: np.roll(y, 1, axis=2)),
        ("output", lambda y: y * FLOAT(1 - 2**-16)),
    ],
)
def test_what_is_not_rounding_is_far_beyond_k(stage: str, wrong: object) -> None:
    problem = simulated(6)
    trace = Naive(problem, np.random.default_rng(0)).stages()
    assert distance(trace[stage], stages_of(problem)[stage]).ratio < K
    assert distance(wrong(trace[stage]), stages_of(problem)[stage]).ratio > 2 * K  # type: ignore[operator]


def test_one_accumulator_stays_near_sigma_where_its_sum_is_large() -> None:
    """A kernel that adds one product after the other errs by more the larger its sum is, however small the products."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((8000, 64), FLOAT), rng.standard_normal((40, 64), FLOAT)
    total = np.zeros((8000, 40), FLOAT)
    for index in range(64):
        total += x[:, index, None] * weight[None, :, index]
    assert distance(total, linear(exact(x), weight, None)).ratio < 0.6 * K
