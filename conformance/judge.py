"""The judge: runs a property's check on every backend, keeps count, and turns what it finds into failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
from hypothesis.errors import HypothesisException

from lyra.backends.protocol import Backend, ModelBackend
from lyra.spec.uncertain import Uncertain

from .case import Case, Problem
from .record import Failure, Property, Record
from .subject import BackendError, Divergence, Outcome, Subject, expected, label
from .tolerance import K_PAIR, distance


class Judge:
    """What a property is given: the backends that have the capabilities it needs, and the ways to hold them to it."""

    def __init__(self, backends: Sequence[Backend], record: Record, prop: Property, needs: Sequence[str] = ()) -> None:
        self.record = record
        self.property = prop
        self.subjects: list[Subject] = []
        for backend in backends:
            missing = [need for need in needs if not has(backend, need)]
            tally = prop.tally(backend.name)
            if missing:
                tally.why_unsupported = f"lacks {', '.join(missing)}"
            else:
                self.subjects.append(Subject(backend, record))

    def each(self, case: Case | str, check: Callable[[Subject], None]) -> None:
        """Run a check on every backend. Counts one compared case; raises the first failure, the others as notes.

        Whatever else a check raises on a backend's answer (a missing method, an array that cannot be indexed) counts
        as that backend's error: it never passes, and never ends the run for the others.
        """
        self.record.cases += 1
        caught: list[Divergence | BackendError] = []
        for subject in self.subjects:
            tally = self.property.tally(subject.name)
            tally.cases += 1
            tally.mark("passed")
            try:
                check(subject)
            except (Divergence, BackendError) as error:
                self._keep(case, subject, error)
                caught.append(error)
            except HypothesisException:
                raise
            except Exception as error:
                wrapped = BackendError(subject.name, error)
                wrapped.__cause__ = error
                self._keep(case, subject, wrapped)
                caught.append(wrapped)
        if caught:
            for other in caught[1:]:
                caught[0].add_note(f"{other.backend}: {other}")
            raise caught[0]

    def oracle(self, case: Case) -> None:
        """Every backend, run as the case says, agrees with the oracle and with every other backend (TOLERANCE-1)."""
        problem = case.problem()
        outcomes: dict[str, Outcome] = {}

        def check(subject: Subject) -> None:
            outcome = subject.run(problem)
            subject.expect_oracle(problem, outcome)
            outcomes[subject.name] = outcome

        self.each(case, check)
        self.agree(case, problem, outcomes)

    def agree(self, case: Case | str, problem: Problem, outcomes: dict[str, Outcome]) -> None:
        """Any two of the outcomes differ by at most K·√2·σ. The one farther from the oracle is blamed."""
        outputs = {name: outcome.output for name, outcome in outcomes.items()}
        self.agree_on(case, problem, "output", outputs, expected(problem)["output"], problem.real)

    def agree_on(
        self,
        case: Case | str,
        problem: Problem,
        what: str,
        values: Mapping[str, np.ndarray],
        wanted: Uncertain,
        where: np.ndarray | None = None,
    ) -> None:
        """The same for any value, by backend; `where` [B,T] shows the rows to compare."""
        for one, other in combinations(values, 2):
            far = distance(values[one], Uncertain(values[other].astype(float), wanted.variance), where)
            self.record.saw(f"{one} ↔ {other}", label(problem, what), far.ratio)
            if far.ratio > K_PAIR:
                blamed = max((one, other), key=lambda name: distance(values[name], wanted, where).ratio)
                error = Divergence(blamed, f"{far.describe(what, K_PAIR)} between {one} and {other}", problem)
                self._keep(case, next(s for s in self.subjects if s.name == blamed), error)
                raise error

    def _keep(self, case: Case | str, subject: Subject, error: Divergence | BackendError) -> None:
        stage = None
        if isinstance(error, Divergence):
            stage = error.stage
            if stage is None and error.problem is not None:
                stage = subject.first_diverging_stage(error.problem)
            error.stage = stage
        self.record.fail(
            Failure(
                property=self.property.name,
                backend=subject.name,
                statements=self.property.statements,
                kind="failed" if isinstance(error, Divergence) else "errored",
                message=str(error),
                stage=stage,
                case=case.to_json() if isinstance(case, Case) else case,
            )
        )


def has(backend: Backend, need: str) -> bool:
    """Whether a backend has a capability, or, for "model", loads whole models."""
    return isinstance(backend, ModelBackend) if need == "model" else need in backend.capabilities
