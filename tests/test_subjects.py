"""The subjects that ship with the suite: found by name, in every way that a model has them, and judged."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from judging import judged
from quick_backends import Right

from lyra.backends.protocol import Unsupported, get_backend, known_backends, known_subjects
from lyra.conformance.case import Case
from lyra.conformance.fit import fitting
from lyra.conformance.session import Profile, Session
from lyra.conformance.subjects.torch_host import Variant
from lyra.spec.attention import AttentionSpec

pytestmark = pytest.mark.usefixtures("empty_folder")


def test_subjects_go_by_name_and_are_not_judged_by_default() -> None:
    assert not known_subjects().keys() & known_backends().keys()
    for name in known_subjects():
        assert get_backend(name).name == name


def test_cases_are_drawn_from_sizes_that_fit() -> None:
    subject, right = get_backend("torch-module"), Right()
    alone = Session([subject], Profile("thorough", examples=2, sizes=32))
    together = Session([subject, right], Profile("thorough", examples=2, sizes=32))
    assert together.scope.sizes == together.sizes
    assert all(some.rope and some.qk_norm and not some.softcap for some in alone.scope.sizes)
    assert any(not (some.rope and some.qk_norm) for some in alone.sizes)
    assert fitting(alone.sizes, []) == alone.sizes


def test_the_ways_into_a_model_all_come_up() -> None:
    spec = AttentionSpec(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4, scale=0.5)
    found = {Variant.of(Case(spec, seed=seed).problem().weights) for seed in range(400)}
    kinds = product(
        ("dynamic", "static"), ("sdpa", "eager"), ("before", "after", "saved", "moved"), (0, 1), (False, True)
    )
    assert {tuple(variant) for variant in found} == set(kinds)


class Reluctant(Right):
    """Cannot be asked for several rows."""

    name = "reluctant"

    def attention(self, spec: AttentionSpec, weights: Any) -> Any:
        """The layer, which refuses some calls."""
        layer = super().attention(spec, weights)

        def call(x: np.ndarray, **rest: Any) -> Any:
            if len(x) > 1:
                raise Unsupported("several rows")
            return layer(x, **rest)

        return call


def test_what_a_layer_cannot_be_asked_is_left_out() -> None:
    record = judged(Reluctant(), only="batch::permuting_rows or static::one_softmax", seed=1).record
    assert not record.failures
    rows, softmax = (record.properties[name].tallies["reluctant"] for name in sorted(record.properties))
    assert (rows.status, rows.cases, rows.reason) == ("unsupported", 0, "does not fit: several rows")
    assert softmax.status == "passed"


@pytest.mark.parametrize("name", sorted(known_subjects()))
def test_a_subject_passes(name: str) -> None:
    record = judged(get_backend(name), only="static::one_softmax or sequential::shared_cache_equals").record
    assert not record.failures
    assert record.count("passed", name) == 2
