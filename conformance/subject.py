"""A backend under test: runs problems call by call, tells its own errors from wrong values, compares in units of σ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from lyra.backends.protocol import (
    Attention,
    Backend,
    Bfloat16Backend,
    Engine,
    FixedBackend,
    ModelBackend,
    Unsupported,
)
from lyra.backends.raised import ends_the_process, interrupted, raised
from lyra.backends.registry import is_able
from lyra.spec.reference import reference, stage_from_trace
from lyra.spec.uncertain import Uncertain, exact

from .answers import Malformed, check_result, check_values
from .blocks import expected_of_block, make_block, stage_of_block
from .case import Problem
from .journal import Journal
from .record import NARROW, Record
from .recorded_inputs import RecordedInput, RecordedInputs
from .tolerance import K_PAIR, MODEL, Distance, K, distance, model_distance, stored_distance

Answer = TypeVar("Answer")


class Divergence(AssertionError):
    """A backend's value is wrong. `problem` is what it was asked; `stage` names the first diverging stage, if known."""

    def __init__(self, backend: str, message: str, problem: Problem | None = None, stage: str | None = None) -> None:
        super().__init__(message)
        self.backend = backend
        self.problem = problem
        self.stage = stage


class BackendError(Exception):
    """A backend raised where it had to answer."""

    def __init__(self, backend: str, error: BaseException) -> None:
        ending = ", which would have ended the run" if ends_the_process(error) else ""
        super().__init__(f"{raised(error)}{ending}")
        self.backend = backend


class Unfit(Exception):
    """A case has a structure that a backend of fixed structure does not have, or asks what by its nature it cannot be
    asked: it has no part in it.
    """


@dataclass(frozen=True)
class Outcome:
    """What a backend answered over all calls: output [B,T,E], the stages by name, and the last call's cache."""

    output: np.ndarray
    trace: dict[str, np.ndarray]
    cache: object


def expected(problem: Problem) -> dict[str, Uncertain]:
    """The oracle's stages for a problem, computed once per problem."""
    if "oracle" not in problem.memo and problem.block is not None:
        problem.memo["oracle"] = expected_of_block(problem)
    elif "oracle" not in problem.memo:
        entered = problem.entered
        problem.memo["oracle"] = reference(
            problem.spec,
            entered.weights,
            entered.x,
            positions=problem.positions,
            mask=problem.mask,
            static=entered.static,
            dtype=problem.dtype,
        )
    found: dict[str, Uncertain] = problem.memo["oracle"]
    return found


def label(problem: Problem, what: str) -> str:
    """What a distance is recorded under: bfloat16 apart from float32."""
    return what if problem.dtype == "float32" else what + NARROW


def stage_alone(problem: Problem, name: str, trace: Mapping[str, np.ndarray], *, moved: bool = True) -> Uncertain:
    """The oracle's value of a stage, from a backend's own stages before it.

    In float32 the two forms that POSITION allows are one up to rounding, and the literal one is taken. In bfloat16
    heads are those of one form or the other, and `moved` says which: static keys at j - P, or live tokens at P + t.
    """
    if problem.block is not None:
        return stage_of_block(problem, name, trace)
    entered = problem.entered
    return stage_from_trace(
        problem.spec,
        entered.weights,
        name,
        trace,
        entered.x,
        positions=problem.positions,
        mask=problem.mask,
        static=entered.static,
        dtype=problem.dtype,
        moved=moved and problem.dtype != "float32",
    )


def alone_distance(problem: Problem, got: np.ndarray, wanted: Uncertain) -> Distance:
    """How far a traced stage is from the oracle's on the stages before it (TOLERANCE-2, TOLERANCE-4)."""
    measure = distance if problem.dtype == "float32" else stored_distance
    return measure(got, wanted, problem.real)


class Subject:
    """One backend, within one property. `inputs` are those of the check that runs, of all backends in it; `takes_part`
    says whether this one is asked what the check is about.
    """

    def __init__(
        self,
        backend: Backend,
        record: Record,
        journal: Journal | None = None,
        shared: dict[Hashable, Any] | None = None,
    ) -> None:
        self._journal = journal or Journal()
        self._shared = {} if shared is None else shared
        self.backend = backend
        self.name = backend.name
        self.record = record
        self.begin(RecordedInputs())

    def begin(self, inputs: RecordedInputs) -> None:
        """A check begins: forget what this backend was asked in the one before."""
        self.inputs = inputs
        self.takes_part = True
        self.recorded: list[RecordedInput] = []
        self._answers: list[tuple[RecordedInput, Problem, Outcome]] = []
        self._held: set[tuple[int, int]] = set()

    def note(self, problem: Problem, calls: tuple[int, ...]) -> RecordedInput:
        """The input that this backend is asked: what premises are looked for in."""
        self.recorded.append(found := self.inputs.note(problem, calls))
        return found

    def can(self, capability: str) -> bool:
        """Whether the backend claims a capability."""
        return is_able(self.backend, capability)

    def layer(self, problem: Problem) -> Attention:
        """The backend's layer, or injected block, for a problem's spec, weights and dtype. Raises BackendError, and
        Unfit where a backend of fixed structure has another one.
        """
        backend = self.backend
        if isinstance(backend, FixedBackend) and (misfit := self.attempt(lambda: backend.fits(problem.described))):
            raise Unfit(misfit)
        if problem.block is not None:
            return self.attempt(lambda: make_block(self.backend, problem))
        if problem.dtype == "float32":
            return self.attempt(lambda: self.backend.attention(problem.spec, problem.weights))
        narrow = cast(Bfloat16Backend, self.backend)
        return self.attempt(lambda: narrow.attention(problem.spec, problem.weights, dtype=problem.dtype))

    def run(
        self,
        problem: Problem,
        calls: tuple[int, ...] | None = None,
        *,
        trace: bool = False,
        cache: object = None,
        layer: Attention | None = None,
    ) -> Outcome:
        """All live tokens of a problem, cut into calls (the problem's own unless given), by a layer of its own unless
        one is given. What begins without a cache is an input that `hold_answers` compares. Raises BackendError.
        """
        calls = calls if calls is not None else problem.calls
        if not self.can("cache"):
            calls = (sum(calls),)
        whole = self.note(problem, calls) if cache is None else None
        layer = layer if layer is not None else self.layer(problem)
        owner = None if problem.own is None else self.layer(problem.own)
        outputs: list[np.ndarray] = []
        traces: list[dict[str, np.ndarray]] = []
        start = 0
        for length in calls:
            part = slice(start, start + length)
            start += length
            if owner is not None and problem.own is not None:
                cache = self._call(owner, problem.own, part, cache)[1]
            output, cache, stages = self._call(layer, problem, part, cache, trace=trace)
            outputs.append(output)
            traces.append(stages)
        joined = {name: np.concatenate([stages[name] for stages in traces], axis=1) for name in traces[0]}
        outcome = Outcome(np.concatenate(outputs, axis=1), joined, cache)
        if whole is not None:
            self._answers.append((whole, problem, outcome))
        return outcome

    def call(
        self, layer: Attention, problem: Problem, given: Problem, *, cache: object = None, trace: bool = False
    ) -> Outcome:
        """One call of a layer with all tokens of a problem. `given` has the arrays that are handed on, as they are: its
        contents are those of the problem. Raises Divergence, BackendError.
        """
        whole = self.note(problem, (problem.x.shape[1],)) if cache is None else None
        rest: dict[str, Any] = {"positions": given.positions, "mask": given.mask, "static": given.static}
        result = self.attempt(lambda: layer(given.x, cache=cache, trace=trace, **rest))
        output, after, stages = self._taken(result, problem, problem.x, 0, trace)
        outcome = Outcome(output, stages, after)
        if whole is not None:  # a copy: whoever asks may write to what it was returned
            self._answers.append((whole, problem, dataclasses.replace(outcome, output=output.copy())))
        return outcome

    def _call(
        self, layer: Attention, problem: Problem, part: slice, cache: object, *, trace: bool = False
    ) -> tuple[np.ndarray, object, dict[str, np.ndarray]]:
        """One call with some tokens of a problem: output, cache and stages. Raises Divergence, BackendError."""
        x, mask = problem.x[:, part], problem.mask[:, part] if not problem.mask.all() else None
        given: dict[str, Any] = {"positions": problem.positions[:, part], "mask": mask, "static": problem.static}
        result = self.attempt(lambda: layer(x, cache=cache, trace=trace, **given))
        return self._taken(result, problem, x, part.start, trace)

    def _taken(
        self, result: Any, problem: Problem, x: np.ndarray, past: int, trace: bool
    ) -> tuple[np.ndarray, object, dict[str, np.ndarray]]:
        """What came back of a call with x, behind `past` tokens, if it can be compared. Raises Divergence."""
        try:
            return check_result(result, problem.described, x.shape[0], x.shape[1], past, traced=trace)
        except Malformed as error:
            when = f", in the call behind the first {past} tokens" if past else ""
            raise Divergence(self.name, f"{error}{when}", problem, error.stage) from None

    def hold_answers(self) -> None:
        """Whatever was asked in this check, from the first token on, is held to the oracle too, unless it has been.

        Raises Divergence.
        """
        for whole, problem, outcome in self._answers:
            if (id(problem), id(outcome.output)) not in self._held:
                self.expect_oracle(problem, outcome)
            whole.outputs.setdefault(self.name, outcome.output)
            whole.held.add(self.name)

    def expect_oracle(self, problem: Problem, outcome: Outcome, stage: str = "output") -> None:
        """The outcome is within K·σ of the oracle at every real token (TOLERANCE-1). Raises Divergence."""
        got = outcome.output if stage == "output" else outcome.trace[stage]
        self._hold(problem, got, expected(problem)[stage], K, stage, "the oracle")
        if not np.isfinite(outcome.output).all():
            raise Divergence(self.name, "the output is not finite at a padding position (MASKED-4)", problem)

    def expect_last(self, problem: Problem, got: np.ndarray) -> None:
        """The output of the last call [B,T,E] is within K·σ of the oracle's last T tokens. Raises Divergence."""
        last = slice(problem.x.shape[1] - got.shape[1], None)
        wanted = expected(problem)["output"].pick((slice(None), last))
        self._hold(problem.part(last, (got.shape[1],)), got, wanted, K, "output", "the oracle")

    def expect_close(
        self, problem: Problem, got: np.ndarray, other: np.ndarray, against: str, stage: str = "output"
    ) -> None:
        """Two outputs [B,T,E] that should be equal up to rounding differ by at most K·√2·σ. Raises Divergence.

        `got` is held to the oracle too: a relation alone is kept by a backend that always answers the same. With
        `stage`, the two are values of that stage of a trace.
        """
        wanted = expected(problem)[stage]
        self._hold(problem, got, Uncertain(other.astype(np.float64), wanted.variance), K_PAIR, stage, against)
        self._hold(problem, got, wanted, K, stage, "the oracle")

    def expect_equal(
        self, problem: Problem, got: np.ndarray, other: np.ndarray, against: str, stage: str = "output"
    ) -> None:
        """Two outputs, or values of a stage [B,T,...], that must be the same bits at every real token.

        Raises Divergence.
        """
        self._hold(problem, got, exact(other), 0.0, stage, against)

    def expect_different(self, problem: Problem, got: np.ndarray, other: np.ndarray, what: str) -> None:
        """Two outputs that must differ, at every real token, by more than rounding could explain. Raises Divergence."""
        sigma = expected(problem)["output"].sigma
        ratio = np.max(np.abs(got.astype(np.float64) - other) / np.maximum(sigma, np.finfo(np.float64).tiny), axis=-1)
        if (ratio[problem.real] <= K).any():
            raise Divergence(self.name, f"{what} made no difference where it must make one", problem)

    def expect(self, problem: Problem | None, condition: bool, message: str) -> None:
        """A plain fact. Raises Divergence with the message where it does not hold."""
        if not condition:
            raise Divergence(self.name, message, problem)

    def _hold(
        self, problem: Problem, got: np.ndarray, wanted: Uncertain, limit: float, stage: str, against: str
    ) -> None:
        if got.shape != wanted.value.shape:
            raise Divergence(self.name, f"{stage} has shape {got.shape}, expected {wanted.value.shape}", problem)
        far = distance(got, wanted, problem.real)
        if stage == "output" and against == "the oracle":
            self._held.add((id(problem), id(got)))
        if limit:
            self.record.observe(self.name, label(problem, stage if against == "the oracle" else against), far.ratio)
        if far.ratio > limit:
            raise Divergence(self.name, f"{far.describe(stage, limit)} against {against}", problem)

    def expect_stages(self, problem: Problem, outcome: Outcome, names: tuple[str, ...] | None = None) -> None:
        """Every traced stage (or those named) is within K·σ of the oracle on the stage before. Raises Divergence."""
        for name, far in self.stage_distances(problem, outcome.trace).items():
            if names is None or name in names:
                self.record.observe(self.name, label(problem, f"{name} alone"), far.ratio)
                if far.ratio > K:
                    message = f"{far.describe(name, K)} against the oracle on the stage before"
                    raise Divergence(self.name, message, problem, name)

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` makes of this backend, made once a run. Raises what it raises."""
        key = (self.name, name)
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def load(self, folder: str) -> Engine:
        """The backend's engine for a folder with a model. Raises BackendError."""
        backend = self.backend
        assert isinstance(backend, ModelBackend)
        return self.attempt(lambda: backend.load(folder))

    def attempt(self, call: Callable[[], Answer]) -> Answer:
        """Call into the backend; what it raises is its own error, whatever it is. Raises BackendError, and Unfit where
        the backend says that it cannot be asked that.

        Only the user's Ctrl-C passes: a backend's `sys.exit()` ends nothing but this call.
        """
        try:
            with self._journal.asking(self.name):
                return call()
        except Unsupported as error:
            raise Unfit(str(error)) from error
        except BaseException as error:
            if interrupted(error):
                raise
            raise BackendError(self.name, error) from error

    def expect_model(self, got: np.ndarray, wanted: np.ndarray, what: str, against: str) -> None:
        """Values of a whole model agree within MODEL of the largest. Raises Divergence."""
        try:
            check_values(what, got, wanted)
        except Malformed as error:
            raise Divergence(self.name, str(error)) from None
        off = model_distance(got, wanted)
        self.record.observe(self.name, f"{what}, whole model", off / MODEL)
        if off > MODEL:
            raise Divergence(
                self.name, f"{what}: |Δ| is {off:.3g} of the largest value (limit {MODEL}) against {against}"
            )

    def stage_distances(self, problem: Problem, trace: dict[str, np.ndarray]) -> dict[str, Distance]:
        """Each traced stage against the oracle run on this backend's own previous stage (TOLERANCE-2)."""
        found = {}
        for name in problem.described.trace_names():
            wanted = stage_alone(problem, name, trace)
            found[name] = far = alone_distance(problem, trace[name], wanted)
            if name == "heads" and problem.dtype != "float32" and far.ratio > K:
                other = alone_distance(problem, trace[name], stage_alone(problem, name, trace, moved=False))
                found[name] = min(far, other, key=lambda form: form.ratio)
        return found

    def first_diverging_stage(self, problem: Problem) -> tuple[str | None, str]:
        """The first stage that is off by more than K·σ given the backend's own stages before it, or None; and what else
        there is to say of its trace: nothing, why no stage can be named, or what is wrong with a stage's shape.
        """
        if not self.can("trace"):
            return None, ""
        for calls in dict.fromkeys([problem.calls, (sum(problem.calls),)]):
            try:
                outcome = self.run(problem, calls, trace=True)
                distances = self.stage_distances(problem, outcome.trace)
            except Divergence as error:
                return error.stage, str(error)
            except Unfit:
                continue
            except BackendError as error:
                return None, f"asked for a trace it raised {error}"
            for name, far in distances.items():
                if far.ratio > K:
                    return name, ""
        return None, ""
