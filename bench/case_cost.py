"""Where the time of the conformance suite goes: what one generated case costs, part by part, on one core.

python bench/case_cost.py --examples 200
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from rich.console import Console
from rich.table import Table

from lyra.backends.protocol import Backend
from lyra.cli.app import run_script
from lyra.cli.conform import ProfileName
from lyra.conformance.case import Case, Problem
from lyra.conformance.launch import make_session
from lyra.conformance.record import Record
from lyra.conformance.scope import Scope
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject, expected

Item = TypeVar("Item")


def draw(count: int, scope: Scope) -> list[Case]:
    """Cases with a context, drawn by Hypothesis as properties draw them."""
    drawn: list[Case] = []

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seed(1)
    @given(case=cases(scope, context=True))
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    return drawn


def milliseconds(work: Callable[[Item], object], items: Sequence[Item], rounds: int = 5) -> float:
    """CPU time of `work` for each of `items`, in the fastest of some rounds."""
    best = float("inf")
    for _ in range(rounds):
        started = time.process_time()
        for item in items:
            work(item)
        best = min(best, time.process_time() - started)
    return 1e3 * best / len(items)


def main(
    examples: Annotated[int, typer.Option(min=1, help="Cases to draw.")] = 200,
    profile: Annotated[ProfileName, typer.Option(help="Whose shapes the cases have.")] = ProfileName.ci,
) -> None:
    """Print what one case costs: drawing it, making its arrays, the oracle, and every backend."""
    session = make_session(["torch", "jax"], profile=profile.value, seed=0, spec=None)
    draw(examples, session.scope)
    started = time.process_time()
    drawn = draw(examples, session.scope)
    rows = [("Hypothesis draws it", 1e3 * (time.process_time() - started) / len(drawn))]
    rows.append(("its arrays", milliseconds(Case.problem, drawn)))
    problems = [case.problem() for case in drawn]
    rows.append(("the oracle, with σ", milliseconds(lambda problem: expected(problem.replace()), problems)))
    calls = sum(len(problem.calls) for problem in problems) / len(problems)
    for backend in session.backends:

        def answer(problem: Problem, backend: Backend = backend) -> object:
            return Subject(backend, Record()).run(problem)

        started = time.process_time()
        for problem in problems:
            answer(problem)
        first = time.process_time() - started
        cost = milliseconds(answer, problems)
        rows.append((f"{backend.name}, {calls:.1f} calls", cost))
        rows.append((f"{backend.name}, the first time all shapes are met (s)", first - 1e-3 * cost * len(problems)))
    table = Table("part", "ms", title=f"One case of profile {profile.value}")
    for name, value in rows:
        table.add_row(name, f"{value:.2f}")
    Console().print(table)


if __name__ == "__main__":
    run_script(main)
