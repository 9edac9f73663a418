"""Failing examples kept between runs: what failed once is tried first next time."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from backends_for_tests import Wrapped

from lyra.conformance.runner import run
from lyra.conformance.session import Profile, Session


class RarelyWrong(Wrapped):
    """Wrong for the inputs that a hash picks, one in nine, and keeps what it was asked."""

    name = "rarely"

    def __init__(self) -> None:
        self.wrong: list[bool] = []

    def attention(self, spec: Any, weights: Any) -> Any:
        """A layer that is off where the sum of its first weight says so."""
        layer = super().attention(spec, weights)
        self.wrong.append(crc32(weights["q_proj.weight"].tobytes()) % 9 == 0)
        off = self.wrong[-1]

        def answer(x: Any, **rest: Any) -> Any:
            result = layer(x, **rest)
            return result._replace(output=result.output * 1.01) if off else result

        return answer


def test_a_failing_example_is_the_first_one_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def first_wrong(seed: int, database: Path | None) -> int:
        backend = RarelyWrong()
        session = Session(backends=[backend], profile=Profile("smoke", 60, 3), seed=seed, database=database)  # type: ignore[list-item]
        assert not run(session, only="layer_equals_oracle").record.ok
        return backend.wrong.index(True)

    folder = tmp_path / "examples"
    assert first_wrong(1, folder) > 0
    assert first_wrong(2, folder) == 0
    assert first_wrong(2, None) > 0
