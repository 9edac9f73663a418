"""What the JAX backend keeps compiled is bounded: a process that meets thousands of shapes has to live through them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lyra.backends.jax_impl import JaxBackend, shapes
from lyra.backends.jax_impl.attention_backend import call_layer
from lyra.backends.jax_impl.gradients import pull_back
from lyra.backends.jax_impl.sequential_backend import call_block
from lyra.conformance.case import Case
from lyra.spec.attention import AttentionSpec
from lyra.spec.sequential import SequentialSpec


def spec_of(hidden_size: int) -> AttentionSpec:
    return AttentionSpec(hidden_size, 2, 1, 4, 0.5)


def test_many_shapes_leave_few_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "MOST_COMPILED", 3)
    jax.clear_caches()
    outputs = []
    for hidden_size in (4, 5, 6, 7, 8, 4):
        problem = Case(spec_of(hidden_size), calls=(2,)).problem()
        layer = JaxBackend().attention(problem.spec, problem.weights)
        outputs.append(layer(problem.x, positions=problem.positions).output)
        assert call_layer._cache_size() <= 3
    assert np.array_equal(outputs[0], outputs[-1])


def test_blocks_and_gradients_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "MOST_COMPILED", 1)
    jax.clear_caches()
    for hidden_size in (4, 5, 6):
        problem = Case(spec_of(hidden_size), calls=(2,)).problem()
        layer = JaxBackend().attention(problem.spec, problem.weights)
        layer.vjp(np.ones_like(problem.x), problem.x, positions=problem.positions)
        norms = {f"{name}_norm.weight": np.zeros(hidden_size, np.float32) for name in ("input", "output")}
        block = JaxBackend().sequential(SequentialSpec(problem.spec), problem.weights | norms)
        block(problem.x, positions=problem.positions)
        assert (pull_back._cache_size(), call_block._cache_size()) == (1, 1)


def test_contexts_of_a_model_come_in_few_widths() -> None:
    widths = [shapes.context_slots(slots) for slots in range(1, 5000)]
    assert all(slots <= width <= max(63 + slots, 17 / 16 * slots) for slots, width in enumerate(widths, 1))
    assert len(set(widths)) <= 52
    steps = {1: 64, 64: 64, 65: 128, 512: 512, 513: 576, 2049: 2176, 8192: 8192, 8193: 8704}
    assert {slots: shapes.context_slots(slots) for slots in steps} == steps
