"""Gradients under test: what a backend's vjp answers, and what it is held to (clause GRAD)."""

from __future__ import annotations

import numpy as np

from lyra.backends.protocol import DifferentiableAttention, Gradients
from lyra.spec.gradients import OracleGradients, gradients
from lyra.spec.uncertain import Uncertain

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


def ask(subject: Subject, problem: Problem, cotangent: np.ndarray) -> dict[str, np.ndarray]:
    """A backend's gradients by name. Raises BackendError, and Divergence where an answer is missing or too much."""
    layer = subject.layer(problem)
    subject.note(problem, (problem.x.shape[1],))
    if not isinstance(layer, DifferentiableAttention):
        raise Divergence(subject.name, 'the backend claims "grad", but its layer has no vjp', problem)
    found: Gradients = subject.attempt(
        lambda: layer.vjp(cotangent, problem.x, positions=problem.positions, mask=problem.mask, static=problem.static)
    )
    kv = {"static_k": found.static_k, "static_v": found.static_v}
    answer = {"x": found.x, **found.weights, **{name: part for name, part in kv.items() if part is not None}}
    names = {"x", *problem.spec.weight_shapes()} | (set(kv) if problem.static is not None else set())
    if set(answer) != names:
        raise Divergence(subject.name, f"gradients of {sorted(answer)}, expected of {sorted(names)}", problem)
    return {name: np.asarray(part) for name, part in answer.items()}


def hold(subject: Subject, problem: Problem, got: dict[str, np.ndarray], wanted: dict[str, Uncertain]) -> None:
    """Every gradient is within K·σ of what is wanted, and exactly 0 where σ is 0. Raises Divergence."""
    for name, part in wanted.items():
        if got[name].shape != part.value.shape:
            message = f"the gradient of {name} has shape {got[name].shape}, expected {part.value.shape}"
            raise Divergence(subject.name, message, problem)
        far = distance(got[name], part)
        subject.record.saw(subject.name, "gradients", far.ratio)
        if far.ratio > K:
            raise Divergence(subject.name, f"{far.describe(f'gradient of {name}', K)} against the oracle", problem)


def agree(judge: Judge, case: Case, problem: Problem, answers: Answers, wanted: dict[str, Uncertain]) -> None:
    """Any two backends' gradients differ by at most K·√2·σ (TOLERANCE-1)."""
    for name, part in wanted.items():
        values = {backend: answer[name] for backend, answer in answers.items()}
        judge.agree_on(case, problem, f"gradient of {name}", values, part)
