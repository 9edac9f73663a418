"""Gradients under test: what a backend's vjp answers, and what it is held to (clause GRAD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lyra.backends.protocol import Attention, DifferentiableAttention
from lyra.spec.gradients import OracleGradients, gradients
from lyra.spec.uncertain import Uncertain

from .answers import OUTPUT, Axes, Malformed, check_array
from .case import Case, Problem
from .judge import Judge
from .subject import Divergence, Subject
from .tolerance import K, distance

Answers = dict[str, dict[str, np.ndarray]]
"""Gradients by backend and by the name of what they belong to."""


def cotangent_of(case: Case) -> np.ndarray:
    """A cotangent [B,T,E] for a case: of unit variance, garbage at padding, where it must not count."""
    rng = np.random.default_rng([case.seed, 22])
    problem = case.problem()
    cotangent = rng.normal(0.0, 1.0, problem.x.shape)
    cotangent[~problem.real] = case.poison
    return cotangent.astype(np.float32)


def wanted_gradients(problem: Problem, cotangent: np.ndarray) -> dict[str, Uncertain]:
    """The oracle's gradients by name: x, the weights, and static_k and static_v where there is a static layer."""
    found: OracleGradients = gradients(
        problem.spec,
        problem.weights,
        cotangent,
        problem.x,
        positions=problem.positions,
        mask=problem.mask,
        static=problem.static,
    )
    kv = {"static_k": found.static_k, "static_v": found.static_v}
    return {"x": found.x, **found.weights, **{name: part for name, part in kv.items() if part is not None}}


def ask(
    subject: Subject,
    problem: Problem,
    cotangent: np.ndarray,
    layer: Attention | None = None,
    given: Problem | None = None,
) -> dict[str, np.ndarray]:
    """A backend's gradients by name, of a layer of its own unless one is given. `given` has the arrays to hand on, the
    problem's own unless told otherwise. Raises BackendError, Divergence where one is missing, too many or misshapen.
    """
    layer = subject.layer(problem) if layer is None else layer
    given = problem if given is None else given
    subject.note(problem, (problem.x.shape[1],))
    if not isinstance(layer, DifferentiableAttention):
        raise Divergence(subject.name, 'the backend claims "grad", but its layer has no vjp', problem)
    found = subject.attempt(
        lambda: layer.vjp(cotangent, given.x, positions=given.positions, mask=given.mask, static=given.static)
    )
    try:
        return check_gradients(found, problem)
    except Malformed as error:
        raise Divergence(subject.name, str(error), problem) from None


def check_gradients(found: Any, problem: Problem) -> dict[str, np.ndarray]:
    """The gradients by name, each in the shape of what it belongs to. Raises Malformed."""
    if not isinstance(found, tuple) or len(found) != 4 or not isinstance(found[1], Mapping):
        raise Malformed(f"vjp gave a {type(found).__name__}, expected Gradients(x, weights, static_k, static_v)")
    of_x, of_weights, of_k, of_v = found
    kv = {"static_k": of_k, "static_v": of_v}
    answer = {"x": of_x, **of_weights, **{name: part for name, part in kv.items() if part is not None}}
    shapes = {"x": problem.x.shape, **problem.spec.weight_shapes()}
    if problem.static is not None:
        shapes |= {"static_k": problem.static.k.shape, "static_v": problem.static.v.shape}
    if answer.keys() != shapes.keys():
        raise Malformed(f"gradients of {sorted(answer)}, expected of {sorted(shapes)}")
    return {name: check_array(f"the gradient of {name}", answer[name], *axes_of(name, shapes[name])) for name in shapes}


def axes_of(name: str, shape: tuple[int, ...]) -> tuple[Axes, dict[str, int]]:
    """The axes of what a gradient belongs to, and how long each is."""
    axes = {3: OUTPUT, 4: ("Bc", "Hs", "S", "D")}.get(len(shape), ("out", "in")[: len(shape)])
    return axes, dict(zip(axes, shape, strict=True))


def hold(subject: Subject, problem: Problem, got: dict[str, np.ndarray], wanted: dict[str, Uncertain]) -> None:
    """Every gradient is within K·σ of what is wanted, and exactly 0 where σ is 0. Raises Divergence."""
    for name, part in wanted.items():
        far = distance(got[name], part)
        subject.record.observe(subject.name, "gradients", far.ratio)
        if far.ratio > K:
            raise Divergence(subject.name, f"{far.describe(f'gradient of {name}', K)} against the oracle", problem)


def agree(judge: Judge, case: Case, problem: Problem, answers: Answers, wanted: dict[str, Uncertain]) -> None:
    """Any two backends' gradients differ by at most K·√2·σ (TOLERANCE-1)."""
    for name, part in wanted.items():
        values = {backend: answer[name] for backend, answer in answers.items()}
        judge.agree_on(case, problem, f"gradient of {name}", values, part)
