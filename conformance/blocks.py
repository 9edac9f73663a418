"""Injected blocks under test: how a backend makes one, and what the oracle says of it (clause SEQUENTIAL)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from lyra.backends.protocol import Attention, Backend, SequentialBackend
from lyra.spec.reference_sequential import OwnKeys, block_stage_from_trace, own_keys, reference_sequential
from lyra.spec.sequential import SequentialSpec
from lyra.spec.uncertain import Uncertain

from .case import Problem


def make_block(backend: Backend, problem: Problem) -> Attention:
    """The backend's block for a problem's spec and weights; raises what the backend raises."""
    return cast(SequentialBackend, backend).sequential(_spec(problem), problem.weights)


def expected_of_block(problem: Problem) -> dict[str, Uncertain]:
    """Every stage of the block by trace name, `output` being what it gives."""
    return reference_sequential(_spec(problem), problem.weights, problem.x, **_call(problem))


def stage_of_block(problem: Problem, name: str, trace: Mapping[str, np.ndarray]) -> Uncertain:
    """One stage of the block, from a backend's own values of the stages before it."""
    return block_stage_from_trace(_spec(problem), problem.weights, name, trace, problem.x, **_call(problem))


def _spec(problem: Problem) -> SequentialSpec:
    return cast(SequentialSpec, problem.described)


def _call(problem: Problem) -> dict[str, Any]:
    return {
        "positions": problem.positions,
        "mask": problem.mask,
        "static": problem.static,
        "own": _own_keys(problem.own),
    }


def _own_keys(own: Problem | None) -> OwnKeys | None:
    """What the cache of the layer holds, in any split: K/V of all its heads at t. Computed once per problem."""
    if own is None:
        return None
    if "keys" not in own.memo:
        own.memo["keys"] = own_keys(own.spec, own.weights, own.x, positions=own.positions)
    found: OwnKeys = own.memo["keys"]
    return found
