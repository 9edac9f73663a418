"""Several processes, one model: contexts sharded over the sequence, and heads over ranks."""

from __future__ import annotations

import numpy as np
import pytest
from ranks import CASES, cotangent_of, run_ranks

from lyra.conformance.tolerance import K, distance
from lyra.spec.gradients import gradients
from lyra.spec.reference import reference

Ranks = list[dict[str, dict[str, np.ndarray]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_ranks(tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_context_gives_the_unsharded_result(ranks: Ranks, name: str) -> None:
    """Within K·σ of the oracle, which has the whole context, and the same bits in every process."""
    problem = CASES[name].problem()
    wanted = reference(
        problem.spec, problem.weights, problem.x, positions=problem.positions, mask=problem.mask, static=problem.static
    )["output"]
    for rank in ranks:
        far = distance(rank[name]["output"], wanted, problem.real)
        assert far.ratio <= K, far.describe("output", K)
        np.testing.assert_array_equal(rank[name]["output"], ranks[0][name]["output"])


@pytest.mark.parametrize("name", CASES)
def test_gradients_through_a_sharded_context(ranks: Ranks, name: str) -> None:
    """Inputs and weights get the whole gradient in every process, each slot its own in the process that holds it."""
    problem = CASES[name].problem()
    wanted = gradients(
        problem.spec, problem.weights, cotangent_of(CASES[name]), problem.x,
        positions=problem.positions, mask=problem.mask, static=problem.static,
    )  # fmt: skip
    assert problem.static is not None
    assert wanted.static_k is not None
    assert wanted.static_v is not None
    slots = {"static_k": wanted.static_k, "static_v": wanted.static_v}
    for rank in ranks:
        for of, expected in {"x": wanted.x, **wanted.weights}.items():
            far = distance(rank[name][of], expected)
            assert far.ratio <= K, far.describe(of, K)
    for of, expected in slots.items():
        parts = [rank[name][of] for rank in ranks]
        held = [part.any(axis=(1, 3)) for part in parts]
        assert not np.logical_and(*held).any()
        far = distance(np.add(*parts), expected)
        assert far.ratio <= K, far.describe(of, K)
