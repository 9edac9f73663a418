"""What a check asks of the backends is held to the oracle and counted, whether the check expects anything or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends_for_tests import SlightlyOff, Wrapped, WrappedAttention
from small_layers import layer

from lyra.backends.protocol import Backend, get_backend
from lyra.conformance.case import Case, Context
from lyra.conformance.generation import with_data
from lyra.conformance.judge import Judge
from lyra.conformance.record import Record
from lyra.conformance.runner import run
from lyra.conformance.session import Profile, Session
from lyra.conformance.subject import Divergence, Subject
from lyra.spec import HeadSplit

SPEC = layer(split=HeadSplit(lyra_q_heads=(1, 4, 5), share_kv=True))
CASE = Case(SPEC, calls=(3, 1), context=Context(5))
PROBLEM = CASE.problem()
OTHER = PROBLEM.replace(x=-PROBLEM.x)


def judge_of(*backends: Backend) -> Judge:
    record = Record()
    return Judge(backends, record, record.register("mine::relation", ("LIVE-4",), "A relation."))


def ask_twice(subject: Subject) -> None:
    subject.run(PROBLEM)
    subject.run(PROBLEM.replace(x=-PROBLEM.x))


def test_what_a_check_does_not_look_at_is_held_to_the_oracle() -> None:
    judge = judge_of(SlightlyOff())
    with pytest.raises(Divergence, match="against the oracle"):
        judge.each(CASE, ask_twice)
    (failure,) = judge.record.failures.values()
    assert (failure.statements, failure.stage) == (("LIVE-4",), "output")


class WrongOnTheOther(Wrapped):
    """Right on PROBLEM, wrong where x has the other sign."""

    name = "wrong on the other"

    def attention(self, spec: Any, weights: Any, *, dtype: str = "float32") -> WrappedAttention:
        """A layer that adds a little where it is to answer for OTHER."""
        right = super().attention(spec, weights, dtype=dtype)

        def call(x: np.ndarray, **rest: Any) -> Any:
            found = right(x, **rest)
            same = (x == PROBLEM.x[:, : x.shape[1]]).all() or (x == PROBLEM.x[:, -x.shape[1] :]).all()
            return found if same else found._replace(output=found.output + np.float32(0.01))

        return call  # type: ignore[return-value]


def test_every_input_of_a_check_is_held() -> None:
    with pytest.raises(Divergence, match="against the oracle"):
        judge_of(WrongOnTheOther()).each(CASE, ask_twice)
    judge_of(WrongOnTheOther()).each(CASE, lambda subject: subject.run(PROBLEM))


def test_a_case_is_held_with_other_data_too_and_the_failing_one_is_kept() -> None:
    judge = judge_of(WrongOnTheOther())
    hold = with_data(lambda case, judge: judge.oracle(case), 3)
    with pytest.raises(Divergence):
        hold(case=CASE, judge=judge)
    (failure,) = judge.record.failures.values()
    assert failure.case == CASE.with_other_data(1).to_json() != CASE.to_json()
    with_data(lambda case, judge: judge.oracle(case), 1)(case=CASE, judge=judge_of(WrongOnTheOther()))


def test_a_profile_says_how_many_data_a_case_is_held_with() -> None:
    once, thrice = (
        run(
            Session(backends=[get_backend("torch")], profile=Profile("smoke", 2, 2, data=data)),
            only="layer_equals_oracle",
        )
        for data in (1, 3)
    )
    assert thrice.record.ok
    assert thrice.record.cases == 3 * once.record.cases > 0


def test_other_data_are_those_of_another_seed() -> None:
    seeds = [CASE.replace(seed=2**32 - 1).with_other_data(index).seed for index in range(100)]
    assert seeds[0] == 2**32 - 1
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert CASE.with_other_data(1).replace(seed=CASE.seed) == CASE


def test_inputs_are_counted_once_each_and_only_where_all_backends_were_asked() -> None:
    judge = judge_of(get_backend("torch"), Wrapped())
    judge.each(CASE, ask_twice)
    assert judge.record.cases == 2
    judge.each(CASE, lambda subject: [subject.run(PROBLEM), subject.run(PROBLEM)])
    assert judge.record.cases == 3
    judge.each(CASE, lambda subject: [subject.run(PROBLEM), subject.run(PROBLEM, (1,) * CASE.tokens)])
    assert judge.record.cases == 5
    assert judge.record.calls == 4 * len(CASE.calls) + CASE.tokens
    judge.each(CASE, lambda subject: [subject.run(PROBLEM), subject.run(OTHER) if subject.name == "torch" else 0])
    assert judge.record.cases == 6
    assert [judge.property.tally(name).cases for name in ("torch", "wrapped")] == [7, 6]
    judge.each(CASE, lambda subject: subject.expect(None, True, "a fact"))
    assert judge.record.cases == 7
    assert judge.record.calls == 5 * len(CASE.calls) + CASE.tokens + 1


def test_backends_are_held_to_each_other_on_every_input() -> None:
    judge = judge_of(get_backend("torch"), Wrapped())
    judge.each(CASE, ask_twice)
    assert len(judge.record.distances["torch ↔ wrapped", "output"]) == 2
    assert len(judge.record.distances["torch", "output"]) == 2


def test_an_input_is_the_same_where_all_that_a_layer_is_given_is() -> None:
    static = PROBLEM.static
    assert static is not None
    assert PROBLEM.same_as(CASE.problem())
    assert PROBLEM.same_as(PROBLEM.replace(calls=(1, CASE.tokens - 1)))
    for other in (
        PROBLEM.replace(weights=PROBLEM.weights | {"o_proj.weight": -PROBLEM.weights["o_proj.weight"]}),
        PROBLEM.replace(static=None),
        PROBLEM.replace(static=static._replace(mask=~static.mask)),
        PROBLEM.replace(positions=PROBLEM.positions + 1),
        PROBLEM.replace(dtype="bfloat16"),
        PROBLEM.respec(scale=2.0),
        OTHER,
    ):
        assert not PROBLEM.same_as(other)
        assert not other.same_as(PROBLEM)
