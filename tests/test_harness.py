"""The harness held to its promises: what is wrong fails, what raises is an error, what is lacking is counted apart."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from backends_for_tests import (
    LyingTrace,
    NoCapabilities,
    NullBackend,
    NullInput,
    NullNoise,
    NullZeros,
    Raises,
    SlightlyOff,
    Wrapped,
    WrongShape,
)
from hypothesis import HealthCheck, given, settings
from judging import judged

from lyra.backends.protocol import CAPABILITIES, Backend, get_backend
from lyra.backends.registry import OTHER_NAMES
from lyra.conformance.case import Case
from lyra.conformance.judge import has
from lyra.conformance.property_index import all_properties
from lyra.conformance.runner import Run
from lyra.conformance.selection import selects
from lyra.conformance.strategies import block_cases, cases
from lyra.spec.errors import InputError

pytestmark = pytest.mark.usefixtures("empty_folder")


def statuses(outcome: Run, backend: str) -> dict[str, str]:
    return {name: prop.tally(backend).status for name, prop in outcome.record.properties.items()}


@pytest.mark.parametrize("null", [NullZeros(), NullInput(), NullNoise(), WrongShape()], ids=lambda b: b.name)
def test_a_null_backend_passes_no_property(null: NullBackend) -> None:
    outcome = judged(null, shrink=False)
    assert outcome.exit_code == 1
    assert not outcome.record.ok
    assert len(outcome.record.properties) == outcome.record.planned == outcome.record.finished
    passed = [name for name, status in statuses(outcome, null.name).items() if status in ("passed", "unsupported")]
    assert passed == []
    if not isinstance(null, WrongShape):  # its captured keys do not even fit a context
        assert outcome.record.count("failed") == len(outcome.record.properties)


def test_a_backend_that_raises_is_errored_and_never_failed() -> None:
    outcome = judged(Raises(), shrink=False)
    assert set(statuses(outcome, "raises").values()) == {"errored"}
    assert outcome.exit_code == 1
    assert {failure.kind for failure in outcome.record.failures.values()} == {"errored"}
    assert all("RuntimeError: out of order" in failure.message for failure in outcome.record.failures.values())


def test_every_capability_that_a_backend_may_claim_is_asked_for() -> None:
    asked = {need for declaration in all_properties().values() for need in declaration.needs}
    assert asked == (CAPABILITIES.keys() | {"model"}) - {*OTHER_NAMES.values()}


def test_a_lacking_capability_is_counted_apart() -> None:
    modest, whole = NoCapabilities(), Wrapped()
    outcome = judged(modest, whole, only="order or live or batch")
    assert outcome.exit_code == 0
    assert outcome.record.ok
    seen = outcome.record.properties
    assert {prop.tally("wrapped").status for prop in seen.values()} == {"passed"}
    assert seen["order::layer_equals_oracle"].tally("modest").status == "passed"
    lacking = seen["batch::reordering_the_cache"].tally("modest")
    assert lacking.status == "unsupported"
    assert lacking.cases == 0
    assert lacking.why_unsupported == "lacks static, cache, reorder"
    assert outcome.record.count("unsupported") == sum(p.tally("modest").cases == 0 for p in seen.values()) > 0


def test_a_backend_that_can_do_nothing_asked_for_does_not_conform() -> None:
    outcome = judged(NoCapabilities(), only="live and causal")
    assert outcome.record.count("unsupported") == len(outcome.record.properties) > 0
    assert outcome.record.cases == 0
    assert not outcome.record.ok


def test_a_small_error_is_found_and_its_stage_named() -> None:
    outcome = judged(SlightlyOff(), only="layer_equals_oracle or calls_may_be_cut or every_stage")
    assert set(statuses(outcome, "off").values()) == {"failed"}
    assert {failure.stage for failure in outcome.record.failures.values()} == {"output"}


def test_a_trace_that_lies_is_found_though_the_output_is_right() -> None:
    outcome = judged(LyingTrace(), only="order or rope or tolerance")
    failed = {name for name, status in statuses(outcome, "liar").items() if status == "failed"}
    assert failed == {
        "order::absent_stages_leave_no_trace",
        "order::every_stage_equals_oracle",
        "rope::stages_at_the_last_position",
        "rope::stages_of_the_rotation",
    }
    assert {outcome.record.failures[name, "liar"].stage for name in failed} == {"k_rope"}


class Broken(Wrapped):
    """Has neither reorder nor crop, though it says so."""

    name = "broken"

    def attention(self, spec: Any, weights: Any) -> Any:
        """A layer that can only be called."""
        layer = super().attention(spec, weights)
        return lambda x, **rest: layer(x, **rest)


def test_what_else_goes_wrong_is_an_error_of_that_backend_only() -> None:
    outcome = judged(Broken(), Wrapped(), only="reordering or cropping")
    assert set(statuses(outcome, "broken").values()) == {"errored"}
    assert set(statuses(outcome, "wrapped").values()) == {"passed"}
    assert not outcome.record.ok


def test_a_backend_is_not_blamed_for_one_that_cannot_capture() -> None:
    outcome = judged(Raises(), get_backend("torch"), only="attached_context")
    assert set(statuses(outcome, "raises").values()) == {"errored"}
    assert set(statuses(outcome, "torch").values()) == {"passed"}


def test_a_property_that_raises_by_itself_never_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_order(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the oracle is out of order")

    monkeypatch.setattr("lyra.conformance.oracles.hf.HuggingFaceOracle.plain", out_of_order)
    outcome = judged(Wrapped(), only="test_equals_hugging_face and identity or layer_equals_oracle")
    assert statuses(outcome, "wrapped") == {
        "identity::equals_hugging_face": "errored",
        "order::layer_equals_oracle": "passed",
    }
    assert not outcome.record.ok
    (failure,) = outcome.record.failures.values()
    assert "the property itself raised ZeroDivisionError" in failure.message


class GivesUp(Wrapped):
    """Somebody presses Ctrl-C at its sixth layer."""

    name = "stopped"
    layers = 0

    def attention(self, spec: Any, weights: Any) -> Any:
        """A layer, or the interruption."""
        self.layers += 1
        if self.layers > 5:
            signal.raise_signal(signal.SIGINT)
        return super().attention(spec, weights)


def test_a_run_cut_short_is_no_pass() -> None:
    outcome = judged(GivesUp(), only="order and (layer_equals_oracle or every_stage)")
    assert 0 < outcome.record.finished < outcome.record.planned
    assert not outcome.could_not_run
    assert not outcome.record.complete
    assert not outcome.record.failures
    assert not outcome.record.ok


def drawn(seed: int) -> list[str]:
    """The cases of a run, as every backend under test is given them."""

    class Listens(Wrapped):
        name = "listens"
        seen: list[str]

        def attention(self, spec: Any, weights: Any) -> Any:
            self.seen.append(f"{spec} {sum(float(array.sum()) for array in weights.values())}")
            return super().attention(spec, weights)

    listening = Listens()
    listening.seen = []
    assert judged(listening, only="layer_equals_oracle or life_of_a_cache", seed=seed).record.ok
    return listening.seen


def test_the_seed_decides_the_cases() -> None:
    first = drawn(1)
    assert drawn(1) == first
    assert drawn(2) != first


def test_a_case_survives_its_json() -> None:
    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases() | block_cases() | block_cases(source="own"))
    def survives(case: Case) -> None:
        again = Case.from_json(case.to_json())
        assert again == case
        assert again.describe() == case.describe()
        one, two = case.problem(), again.problem()
        assert one.x.tobytes() == two.x.tobytes()
        assert one.described == two.described
        assert (one.own is None) == (case.block is None or case.block.source == "external")

    survives()


@pytest.mark.parametrize(
    ("expression", "holds"),
    [
        ("rope", False),
        ("static", True),
        ("STATIC-2 or one_softmax", True),
        ("static::one and not softmax", False),
        ("not (rope or order) and static::one_softmax", True),
        ("test_static::test_one", True),
    ],
)
def test_an_expression_selects_by_name(expression: str, holds: bool) -> None:
    assert selects(expression, "test_static", "test_one_softmax") is holds


@pytest.mark.parametrize("expression", ["", "and", "static static", "(static", "not", "__import__('os')"])
def test_what_is_no_expression_is_refused(expression: str) -> None:
    with pytest.raises(InputError, match="is no expression"):
        selects(expression, "test_static", "test_one")


def test_only_looks_at_names_and_at_no_folder() -> None:
    seen = judged(Wrapped(), only="rope and not huge").record.properties
    assert {name.partition("::")[0] for name in seen} == {"rope"}


@pytest.mark.parametrize("backend", [NullBackend(), Wrapped(), NoCapabilities()], ids=lambda b: b.name)
def test_the_backends_of_these_tests_are_what_they_claim(backend: Backend) -> None:
    assert has(backend, "model") == isinstance(backend, NullBackend)
    assert all(has(backend, capability) for capability in backend.capabilities)
