"""One call for your own tests: hold backends to the oracle and to each other for one case, or for one split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import strategies as st

from lyra.backends.protocol import Backend, check_backend, get_backend
from lyra.spec.attention import AttentionSpec, Live, Positions, StaticSpec
from lyra.spec.split import HeadSplit

from .case import Case
from .generation import settings_of
from .judge import Judge
from .launch import load_backends, prepare_environment
from .record import NARROW, Property, Record
from .replay import command, describe, write_replay
from .session import Profile, Session, UsageError
from .strategies import LIVE, POSITIONS, cases
from .subject import BackendError, Divergence

PROPERTY = Property(
    "split::any_split_equals_oracle", ("SPLIT-2", "STATIC-1"), "The property of the suite that replays these cases."
)
OUTPUTS = ("output", "output" + NARROW)
"""What is recorded of outputs, by dtype; a check has one of them."""

POOL = 4
"""Shapes that the cases of one split come from: a backend that compiles does so this often, for each mode."""


@dataclass(frozen=True)
class Checked:
    """What was compared. `largest` is the largest |Δ|/σ of an output, by backend and by pair of backends."""

    cases: int
    largest: dict[str, float]

    def __str__(self) -> str:
        far = ", ".join(f"{name} {ratio:.2f}" for name, ratio in self.largest.items())
        return f"{self.cases} cases; largest |Δ|/σ: {far}"


def check_case(case: Case, *, backends: Sequence[str | Backend] | None = None) -> Checked:
    """Hold backends to the oracle and to each other on one case (clause TOLERANCE).

    `backends` are names, "package.module:Class" or backends themselves; None means every installed one. Raises
    Divergence, an AssertionError, for a wrong value and BackendError where a backend raised, both with the case, the
    first diverging stage and the command that replays it; UsageError for a backend that cannot take part.
    """
    judge = _judge(backends)
    _hold(judge, case)
    return _checked(judge)


def check_split(
    spec: AttentionSpec,
    split: HeadSplit,
    *,
    backends: Sequence[str | Backend] | None = None,
    live: Sequence[Live] = LIVE,
    positions: Sequence[Positions] = POSITIONS,
    examples: int = 40,
    seed_of_cases: int = 0,
) -> Checked:
    """Hold backends to the oracle and to each other for one split of a layer (clauses SPLIT, TOLERANCE).

    Generates up to `examples` cases, fewer for layers of real size: contexts, batches, paddings, ways to cut the
    tokens into calls, data, and the modes that `live` and `positions` name. A failure is shrunk first. Raises what
    `check_case` raises, and SpecError for a split that the layer does not allow.
    """
    judge = _judge(backends)
    session = Session(profile=Profile("smoke", examples, POOL), seed=seed_of_cases, spec=spec.replace(split=split))
    modes = st.builds(StaticSpec, live=st.sampled_from(live), positions=st.sampled_from(positions))

    @settings_of(session, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
    @seed(seed_of_cases)
    @given(case=cases(session.scope), mode=modes)
    def hold(case: Case, mode: StaticSpec) -> None:
        judge.oracle(case.respec(static=mode))

    try:
        hold()
    except (Divergence, BackendError) as error:
        _explain(judge, error)
        raise
    return _checked(judge)


def _judge(backends: Sequence[str | Backend] | None) -> Judge:
    """A judge of these backends. Raises UsageError where one of them knows no static context."""
    prepare_environment()
    wanted = load_backends([]) if backends is None else backends
    chosen = [get_backend(some) if isinstance(some, str) else check_backend(some) for some in wanted]
    record = Record()
    prop = record.register(PROPERTY.name, PROPERTY.statements, PROPERTY.summary)
    judge = Judge(chosen, record, prop, ("static",))
    lacking = [backend.name for backend in chosen if backend.name not in {subject.name for subject in judge.subjects}]
    if lacking:
        raise UsageError(f"backends {lacking} lack the capability 'static', without which a split has no meaning")
    return judge


def _hold(judge: Judge, case: Case) -> None:
    try:
        judge.oracle(case)
    except (Divergence, BackendError) as error:
        _explain(judge, error)
        raise


def _explain(judge: Judge, error: Divergence | BackendError) -> None:
    """Write the replay file of every backend that failed, and say so on the error."""
    for failure in judge.record.failures.values():
        written = dataclasses.replace(failure, replay=str(write_replay(failure)))
        error.add_note(describe(written, command(written, {})))


def _checked(judge: Judge) -> Checked:
    distances = judge.record.distances.items()
    return Checked(judge.record.cases, {name: max(ratios) for (name, stage), ratios in distances if stage in OUTPUTS})
