"""The judge: runs a property's check on every backend, keeps count, and turns what it finds into failures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from functools import cache, partial
from itertools import combinations
from typing import Any

import numpy as np

from lyra.backends.protocol import Backend, ModelBackend
from lyra.backends.raised import interrupted
from lyra.backends.registry import is_able
from lyra.spec.uncertain import Uncertain

from .case import Case, Problem
from .journal import Journal
from .premises import Premise
from .record import Failure, Property, Record
from .recorded_inputs import RecordedInputs
from .subject import BackendError, Divergence, Subject, Unfit, expected, label
from .tolerance import K_PAIR, distance


class Judge:
    """What a property is given: the backends that have the capabilities it needs, and the ways to hold them to it."""

    def __init__(
        self,
        backends: Sequence[Backend],
        record: Record,
        prop: Property,
        needs: Sequence[str] = (),
        premises: Sequence[Premise] = (),
        journal: Journal | None = None,
        shared: dict[Hashable, Any] | None = None,
        lost: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self.record = record
        self.property = prop
        self.premises = premises
        self.subjects: list[Subject] = []
        self._journal = journal or Journal()
        self._lost = lost or {}
        for backend in backends:
            tally, subject = prop.tally(backend.name), Subject(backend, record, self._journal, shared)
            try:
                missing = subject.attempt(partial(lacking, backend, needs))
            except BackendError as error:
                self._keep(lambda: "its capabilities", subject, error)
                continue
            if missing:
                tally.why_unsupported = f"lacks {', '.join(missing)}"
            else:
                self.subjects.append(subject)

    def each(self, case: Case | str, check: Callable[[Subject], None]) -> None:
        """Run a check on every backend; raise the first failure, the others as notes.

        Beside what the check expects, all that it asks is held to the oracle, and the backends' answers to each other
        (TOLERANCE-1). Counts a compared case for every input that all backends were asked, one where a check compares
        something else. Whatever else a check raises on a backend's answer (a missing method, an array that cannot be
        indexed) counts as that backend's error. A backend that the case does not fit, or whose process it has ended
        before, has no part.
        """
        inputs, text = RecordedInputs(), cache(lambda: text_of(case))
        try:
            caught = [error for subject in self.subjects if (error := self._caught(text, subject, check, inputs))]
        finally:
            names = [subject.name for subject in self.subjects if subject.takes_part]
            compared = inputs.compared(names) if names else []
            self.record.cases += max(1, len(compared)) if names else 0
            self.record.calls += max(1, sum(len(recorded.calls) for recorded in compared)) if names else 0
        if caught:
            for other in caught[1:]:
                caught[0].add_note(f"{other.backend}: {other}")
            raise caught[0]
        for recorded in compared:
            problem = recorded.problem
            self.agree_on(case, problem, "output", recorded.outputs, expected(problem)["output"], problem.real)

    def _caught(
        self, text: Callable[[], str], subject: Subject, check: Callable[[Subject], None], inputs: RecordedInputs
    ) -> Divergence | BackendError | None:
        """Run a check on one backend: its failure, if it fails, which is kept; it has none where it takes no part."""
        subject.begin(inputs)
        lost = self._lost.get(subject.name)
        if lost and text() in lost:
            subject.takes_part = False
            return None
        tally = self.property.tally(subject.name)
        found: Divergence | BackendError | None = None
        try:
            with self._journal.asking(subject.name, text):
                check(subject)
                subject.hold_answers()
        except Unfit as error:
            tally.misfit, subject.takes_part = str(error), False
            return None
        except (Divergence, BackendError) as error:
            found = error
        except BaseException as error:
            if interrupted(error):
                raise
            found = BackendError(subject.name, error)
            found.__cause__ = error
        tally.cases += max(1, len(inputs.compared([subject.name])))
        if found is None:
            tally.mark("passed")
            for premise in self.premises:
                tally.met[premise.name] += any(premise.met_by(recorded) for recorded in subject.recorded)
        else:
            self._keep(text, subject, found)
        return found

    def meet(self, premise: Premise, holds: bool) -> None:
        """Say of a premise that no single input shows whether it is met now, by every backend."""
        if premise in self.premises:
            for subject in self.subjects:
                self.property.tally(subject.name).met[premise.name] += bool(holds)

    def oracle(self, case: Case) -> None:
        """Every backend, run as the case says, agrees with the oracle and with every other backend (TOLERANCE-1)."""
        problem = case.problem()
        self.each(case, lambda subject: subject.expect_oracle(problem, subject.run(problem)))

    def agree_on(
        self,
        case: Case | str,
        problem: Problem,
        what: str,
        values: Mapping[str, np.ndarray],
        wanted: Uncertain,
        where: np.ndarray | None = None,
    ) -> None:
        """Any two backends' values of something differ by at most K·√2·σ at the rows that `where` [B,T] shows.

        The one farther from the oracle is blamed. Raises Divergence.
        """
        for first, other in combinations(values, 2):
            far = distance(values[first], Uncertain(values[other].astype(float), wanted.variance), where)
            self.record.observe(f"{first} ↔ {other}", label(problem, what), far.ratio)
            if far.ratio > K_PAIR:
                blamed = max((first, other), key=lambda name: distance(values[name], wanted, where).ratio)
                error = Divergence(blamed, f"{far.describe(what, K_PAIR)} between {first} and {other}", problem)
                self._keep(lambda: text_of(case), next(s for s in self.subjects if s.name == blamed), error)
                raise error

    def _keep(self, text: Callable[[], str], subject: Subject, error: Divergence | BackendError) -> None:
        stage, message = None, str(error)
        if isinstance(error, Divergence):
            stage = error.stage
            if stage is None and error.problem is not None:
                with self._journal.asking(subject.name, text):
                    stage, of_trace = subject.first_diverging_stage(error.problem)
                message += f"; {of_trace}" if of_trace else ""
            error.stage = stage
        self.record.fail(
            Failure(
                property=self.property.name,
                backend=subject.name,
                statements=self.property.statements,
                kind="failed" if isinstance(error, Divergence) else "errored",
                message=message,
                stage=stage,
                case=text(),
            )
        )


def text_of(case: Case | str) -> str:
    """A case as a failure and a journal keep it."""
    return case.to_json() if isinstance(case, Case) else case


def lacking(backend: Backend, needs: Sequence[str]) -> list[str]:
    """What a backend does not have of what a property needs."""
    return [need for need in needs if not has(backend, need)]


def has(backend: Backend, need: str) -> bool:
    """Whether a backend has a capability, or, for "model", loads whole models."""
    return isinstance(backend, ModelBackend) if need == "model" else is_able(backend, need)
