"""check_split and check_case: what a user's own tests call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lyra
from lyra.backends.protocol import Attention, get_backend
from lyra.conformance import BackendError, Divergence, check_case, check_split
from lyra.conformance.case import Case, Context
from lyra.conformance.replay import Replay
from lyra.conformance.session import UsageError

LAYER = lyra.AttentionSpec(hidden_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=8, scale=8**-0.5)
SPLIT = lyra.HeadSplit(lyra_q_heads=(1, 2), share_kv=True)


class Careless:
    """The torch backend, but "continue" is taken for "overlay"."""

    name = "careless"
    capabilities = frozenset({"static", "cache", "trace"})

    def attention(self, spec: lyra.AttentionSpec, weights: Mapping[str, np.ndarray]) -> Attention:
        """A layer that leaves static keys where they sit."""
        wrong = spec.replace(static=spec.static.replace(positions="overlay"))
        return get_backend("torch").attention(wrong, weights)


class Broken(Careless):
    """A backend that raises."""

    name = "broken"

    def attention(self, spec: lyra.AttentionSpec, weights: Mapping[str, np.ndarray]) -> Attention:
        """Never a layer."""
        raise ZeroDivisionError("no layer today")


class Plain(Careless):
    """A backend without static contexts."""

    name = "plain"
    capabilities: frozenset[str] = frozenset()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay files go to the working folder."""
    monkeypatch.chdir(tmp_path)


def test_a_right_backend_passes_and_says_how_far_it_was() -> None:
    found = check_split(LAYER, SPLIT, backends=["torch"], examples=10)
    assert found.cases == 10
    assert 0 < found.largest["torch"] < 8
    assert str(found).startswith("10 cases; largest |Δ|/σ: torch ")


def test_two_backends_are_held_to_each_other() -> None:
    pytest.importorskip("jax")
    found = check_split(LAYER, SPLIT, backends=["torch", "jax"], examples=3, live=("causal",), positions=("continue",))
    assert set(found.largest) == {"torch", "jax", "torch ↔ jax"}


def test_a_wrong_backend_is_shrunk_to_one_case_that_replays() -> None:
    with pytest.raises(Divergence) as caught:
        check_split(LAYER, SPLIT, backends=["torch", Careless()], examples=30)
    assert caught.value.backend == "careless"
    assert caught.value.stage == "heads"
    notes = "\n".join(caught.value.__notes__)
    assert "SPLIT-2, STATIC-1 failed on backend 'careless'" in notes
    assert "Lyra heads (1, 2) sharing KV; live='causal' positions='continue'" in notes
    replay = Replay.read(".lyra/cases/split-any_split_equals_oracle-careless.json")
    assert replay.case is not None
    assert replay.case.spec.split == SPLIT
    with pytest.raises(Divergence):
        check_case(replay.case, backends=[Careless()])
    assert check_case(replay.case, backends=["torch"]).cases == 1


def test_modes_can_be_narrowed() -> None:
    assert check_split(LAYER, SPLIT, backends=[Careless()], positions=("overlay",), examples=5).cases == 5


def test_a_backend_that_raises_is_an_error_and_no_divergence() -> None:
    with pytest.raises(BackendError, match="ZeroDivisionError: no layer today") as caught:
        check_case(Case(LAYER.replace(split=SPLIT), context=Context(3)), backends=[Broken()])
    assert "errored on backend 'broken'" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backends": [Plain()]}, UsageError, "plain.*lack the capability 'static'"),
        ({"backends": ["nobody"]}, lyra.BackendNotFound, "unknown backend 'nobody'"),
        ({"split": lyra.HeadSplit(lyra_q_heads=(1,))}, lyra.SpecError, "share_kv=True"),
        ({"split": lyra.HeadSplit(lyra_q_heads=(4,))}, lyra.SpecError, "no query heads"),
    ],
)
def test_what_cannot_be_checked_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_split(LAYER, **({"split": SPLIT, "backends": ["torch"]} | arguments))
