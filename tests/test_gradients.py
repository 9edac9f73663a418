"""The oracle's gradients, held to finite differences of the oracle itself, and what they must be where one can tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lyra.backends.protocol import DifferentiableAttention, Gradients, get_backend
from lyra.conformance.case import Case, Context, Problem
from lyra.conformance.tolerance import K, distance
from lyra.spec.attention import AttentionSpec, QKNormSpec, RopeSpec, StaticSpec
from lyra.spec.errors import InputError
from lyra.spec.gradients import OracleGradients, gradients
from lyra.spec.reference import reference
from lyra.spec.split import HeadSplit

GRID = 2.0**-16
STEP = 2.0**-13
"""Inputs are float32 at the door, so they and all steps stand on a grid on which float32 is exact."""

CLOSE = 1e-9
"""Central differences of fourth order with step h are off by about h⁴ times the fifth derivative."""

BACKENDS = ("torch", "jax")


def layer(**changes: object) -> AttentionSpec:
    """Four query heads on two KV heads, both groups cut."""
    common = {
        "hidden_size": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "scale": 0.7,
        "rope": RopeSpec(theta=100.0),
        "split": HeadSplit(lyra_q_heads=(1, 2), share_kv=True),
    }
    return AttentionSpec(**(common | changes))


CONTEXT = Context(tokens=3, hidden=(1,))
CASES = {
    "causal": Case(spec=layer(), calls=(3,), batch=2, context=CONTEXT),
    "self, overlay, own contexts": Case(
        spec=layer(static=StaticSpec(live="self", positions="overlay")),
        calls=(3,),
        batch=2,
        context=Context(tokens=3, batch=2, start=5, hidden=(1, 3), gaps=True),
    ),
    "none, padding": Case(
        spec=layer(static=StaticSpec(live="none")), calls=(3,), batch=2, context=CONTEXT, padding=(0, 2), poison=3.0
    ),
    "softcap and bias": Case(spec=layer(softcap=0.8, bias=True), calls=(3,), batch=1, context=CONTEXT),
    "plain": Case(spec=layer(qk_norm=None, rope=None, split=None), calls=(3,), batch=1),
    "window, large eps": Case(
        spec=layer(sliding_window=2, split=None, qk_norm=QKNormSpec(eps=0.5)), calls=(4,), padding=(1,), poison=3.0
    ),
}


def cotangent_of(problem: Problem) -> np.ndarray:
    return np.random.default_rng(3).normal(size=problem.x.shape).astype(np.float32)


def oracle(problem: Problem, cotangent: np.ndarray) -> OracleGradients:
    return gradients(
        problem.spec,
        problem.weights,
        cotangent,
        problem.x,
        positions=problem.positions,
        mask=problem.mask,
        static=problem.static,
    )


def on_grid(problem: Problem) -> Problem:
    def snap(array: np.ndarray) -> np.ndarray:
        return (np.round(array / GRID) * GRID).astype(np.float32)

    static = problem.static and problem.static._replace(k=snap(problem.static.k), v=snap(problem.static.v))
    weights = {name: snap(weight) for name, weight in problem.weights.items()}
    return problem.replace(x=snap(problem.x), weights=weights, static=static)


def moved(problem: Problem, name: str, by: np.ndarray) -> Problem:
    """The problem with one argument moved: "x", "static_k", "static_v" or a weight."""
    if name == "x":
        return problem.replace(x=problem.x + by)
    if name in problem.weights:
        return problem.replace(weights=problem.weights | {name: problem.weights[name] + by})
    assert problem.static is not None
    field = name.removeprefix("static_")
    return problem.replace(static=problem.static._replace(**{field: getattr(problem.static, field) + by}))


def loss(problem: Problem, cotangent: np.ndarray) -> float:
    output = reference(
        problem.spec,
        problem.weights,
        problem.x,
        positions=problem.positions,
        mask=problem.mask,
        static=problem.static,
    )["output"].value
    return float((output * cotangent)[problem.real].sum())


def difference(problem: Problem, cotangent: np.ndarray, name: str, direction: np.ndarray) -> float:
    """The derivative of the loss along a direction, by central differences of fourth order."""

    def at(steps: int) -> float:
        return loss(moved(problem, name, steps * STEP * direction), cotangent)

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)


def named(found: OracleGradients | Gradients) -> dict[str, Any]:
    """Gradients, ours or a backend's, by the name of what they belong to."""
    kv = {"static_k": found.static_k, "static_v": found.static_v} if found.static_k is not None else {}
    return {"x": found.x, **found.weights, **kv}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_oracles_gradients_equal_finite_differences(case: Case) -> None:
    problem = on_grid(case.problem())
    cotangent = cotangent_of(problem)
    rng = np.random.default_rng(0)
    found = named(oracle(problem, cotangent))
    assert set(found) == {"x", *problem.weights} | ({"static_k", "static_v"} if problem.static else set())
    for name, gradient in found.items():
        for _ in range(3):
            direction = rng.choice([-1.0, 1.0], gradient.value.shape)
            along = float((gradient.value * direction).sum())
            off = abs(along - difference(problem, cotangent, name, direction))
            assert off <= CLOSE * max(1.0, np.abs(gradient.value).sum()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_backends_are_within_the_tolerance(case: Case, backend: str) -> None:
    problem = case.problem()
    cotangent = cotangent_of(problem)
    layer = get_backend(backend).attention(problem.spec, problem.weights)
    assert isinstance(layer, DifferentiableAttention)
    got = named(layer.vjp(cotangent, problem.x, positions=problem.positions, mask=problem.mask, static=problem.static))
    for name, wanted in named(oracle(problem, cotangent)).items():
        far = distance(got[name], wanted)
        assert far.ratio <= K, far.describe(name, K)


@pytest.mark.parametrize("backend", BACKENDS)
def test_garbage_that_overflows_stays_without_influence(backend: str) -> None:
    """Hidden values so large that their scores and norms are infinite: a zero times them would be NaN."""
    case = CASES["self, overlay, own contexts"].replace(spec=layer(softcap=0.8), padding=(1, 0))
    answers = []
    for poison in (3e38, 1.0):
        problem = case.replace(poison=poison).problem()
        found = get_backend(backend).attention(problem.spec, problem.weights)
        assert isinstance(found, DifferentiableAttention)
        cotangent = cotangent_of(problem)
        cotangent[~problem.real] = np.nan
        answers.append(
            named(
                found.vjp(cotangent, problem.x, positions=problem.positions, mask=problem.mask, static=problem.static)
            )
        )
    for name, gradient in answers[0].items():
        assert np.isfinite(gradient).all(), name
        np.testing.assert_array_equal(gradient, answers[1][name])
    assert not answers[0]["x"][0, 0].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case",
    [
        CASES["plain"].replace(context=Context(tokens=2)),
        CASES["causal"].replace(context=Context(tokens=0)),
        CASES["causal"].replace(context=Context(tokens=2, hidden=(2,))),
    ],
    ids=["no Lyra heads", "no slots", "nothing visible"],
)
def test_a_static_layer_that_nothing_reads_gets_zeros(case: Case, backend: str) -> None:
    problem = case.problem()
    assert problem.static is not None
    found = get_backend(backend).attention(problem.spec, problem.weights)
    assert isinstance(found, DifferentiableAttention)
    got = found.vjp(cotangent_of(problem), problem.x, positions=problem.positions, static=problem.static)
    for part in (got.static_k, got.static_v):
        assert part is not None
        assert part.shape == problem.static.k.shape
        assert not part.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cotangent_of_another_shape_is_refused(backend: str) -> None:
    problem = CASES["plain"].problem()
    found = get_backend(backend).attention(problem.spec, problem.weights)
    assert isinstance(found, DifferentiableAttention)
    with pytest.raises(InputError, match=r"cotangent has shape \(1, 3, 5\).*expected float32 \(1, 3, 6\)"):
        found.vjp(np.zeros((1, 3, 5), np.float32), problem.x, positions=problem.positions)
