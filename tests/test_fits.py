"""Backends of fixed structure: what they do not have is not asked of them, and the report says so."""

from __future__ import annotations

from typing import Any

import pytest
from judging import judged
from quick_backends import Right, Zeros

from lyra.conformance.runner import run
from lyra.conformance.session import Profile, Session
from lyra.spec.attention import AttentionSpec

pytestmark = pytest.mark.usefixtures("empty_folder")


class Unbiased(Right):
    """Its layers have no bias and one scale."""

    name = "unbiased"
    asked: list[AttentionSpec]

    def __init__(self) -> None:
        self.asked = []

    def fits(self, spec: AttentionSpec) -> str | None:
        """No bias, and the usual scale."""
        return "a bias" if spec.bias else "its scale" if spec.scale != spec.head_dim**-0.5 else None

    def attention(self, spec: AttentionSpec, weights: Any) -> Any:
        """Keeps what it is asked to make."""
        self.asked.append(spec)
        return super().attention(spec, weights)


class UnbiasedZeros(Zeros):
    """The same structure, and wrong."""

    name = "unbiased zeros"
    fits = Unbiased.fits


class FitsNothing(Right):
    """Refuses every spec."""

    name = "fits nothing"

    def fits(self, spec: AttentionSpec) -> str | None:
        """Never."""
        return "all that is"


BIAS, SOFTMAX = "order::every_projection_has_its_bias", "static::one_softmax_over_static_and_live"


def test_what_does_not_fit_is_not_asked_and_is_no_verdict_over_the_others() -> None:
    fixed, right = Unbiased(), Right()
    session = Session([fixed, right], Profile("smoke", examples=12, sizes=12))
    record = run(session, only="order::every_projection or static::one_softmax").record
    assert not record.failures
    assert fixed.asked
    assert not any(spec.bias or spec.scale != spec.head_dim**-0.5 for spec in fixed.asked)
    of_bias, of_softmax = (record.properties[name].tallies for name in (BIAS, SOFTMAX))
    assert [of_bias[name].status for name in ("unbiased", "right")] == ["unsupported", "passed"]
    assert of_bias["unbiased"].reason == "does not fit: a bias"
    assert [of_softmax[name].status for name in ("unbiased", "right")] == ["passed", "passed"]
    assert 0 < of_softmax["unbiased"].cases < of_softmax["right"].cases
    assert of_softmax["unbiased"].reason == ""


def test_a_property_of_which_nothing_fits_is_unsupported() -> None:
    record = judged(FitsNothing(), only="static::one_softmax").record
    (prop,) = record.properties.values()
    tally = prop.tallies["fits nothing"]
    assert (tally.status, tally.cases, tally.reason) == ("unsupported", 0, "does not fit: all that is")
    assert record.cases == 0
    assert not record.ok


def test_a_fixed_structure_excuses_nothing_that_fits() -> None:
    record = judged(UnbiasedZeros(), only="static::one_softmax").record
    assert {failure.kind for failure in record.failures.values()} == {"failed"}
