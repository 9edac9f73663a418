"""Whole models with injected blocks in JAX: the same as in PyTorch, fed in any pieces (clause SEQUENTIAL)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
pytest.importorskip("torch")

from tiny_gemma import CUT, GLOBAL, assert_close, left_padding, random_ids  # noqa: E402

from lyra.backends.jax_impl import forward  # noqa: E402
from lyra.backends.jax_impl.model import JaxEngine  # noqa: E402
from lyra.backends.protocol import SequentialEngine  # noqa: E402
from lyra.backends.torch_impl import TorchBackend  # noqa: E402
from lyra.spec import HeadSplit, InputError, SequentialSpec, StaticSpec  # noqa: E402
from lyra.spec.inputs import StaticLayer  # noqa: E402

SLOTS = 12
ALL, SOME = HeadSplit((0, 1, 2, 3)), CUT
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "causal, some heads": {"split": SOME, "live": "causal", "gate": -0.5, "residual": False},
    "no output norm": {"live": "self", "positions": "overlay", "gate": 0.1, "output_norm": False},
    "own keys": {"source": "own"},
}


@pytest.fixture(scope="module")
def torch_model(gemma_folder: Path) -> Any:
    return TorchBackend().load(str(gemma_folder))


@pytest.fixture
def engines(torch_model: Any, jax_engine: JaxEngine) -> Iterator[tuple[Any, JaxEngine]]:
    """The same model in both backends, plain before and after."""
    yield torch_model, jax_engine
    torch_model.detach()
    jax_engine.detach()


def blocks_of(
    engine: JaxEngine,
    *,
    split: HeadSplit = ALL,
    live: Any = "none",
    positions: Any = "continue",
    gate: float = 0.7,
    source: Any = "external",
    **options: Any,
) -> tuple[dict[int, StaticLayer], dict[int, SequentialSpec]]:
    """Blocks for the global layers and their contexts, a slot hidden; none where they read the model's own keys."""
    spec, rng = engine.spec.attention, np.random.default_rng(2)
    if source == "external":
        spec = spec.replace(split=split, static=StaticSpec(live=live, positions=positions))
    block = SequentialSpec(attention=spec, gate=gate, source=source, norm_eps=engine.spec.rms_norm_eps, **options)
    mask, places = np.ones((1, SLOTS), bool), np.arange(SLOTS)[None]
    mask[0, 4] = False
    k, v = rng.normal(size=(2, len(GLOBAL), 1, 2, SLOTS, 16)).astype(np.float32)
    static = {layer: StaticLayer(k[rank], v[rank], mask, places) for rank, layer in enumerate(GLOBAL)}
    return static if source == "external" else {}, dict.fromkeys(GLOBAL, block)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_pytorch(engines: tuple[Any, JaxEngine], kind: str) -> None:
    """Logits of padded rows, and greedy tokens."""
    ids, mask, found = random_ids(2, 13), left_padding(2, 13), []
    given = blocks_of(engines[1], **KINDS[kind])
    for engine in engines:
        plain = engine.logits(ids, mask)
        engine.inject(*given)
        found.append((engine.logits(ids, mask)[mask], engine.generate(ids, mask, max_new_tokens=5)))
        assert np.abs(found[-1][0] - plain[mask]).max() > 1e-2
    assert_close(found[1][0], found[0][0])
    np.testing.assert_array_equal(found[1][1], found[0][1])


@pytest.mark.parametrize("kind", ["causal, some heads", "own keys"])
def test_blocks_do_not_depend_on_how_the_text_is_fed(jax_engine: JaxEngine, kind: str) -> None:
    ids, mask = random_ids(2, 13), left_padding(2, 13)
    jax_engine.inject(*blocks_of(jax_engine, **KINDS[kind]))
    assert_close(in_pieces(jax_engine, ids, mask)[mask], jax_engine.logits(ids, mask)[mask])


def in_pieces(engine: JaxEngine, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits [B,T,V] of a text fed as seven tokens and then one by one."""
    graph, parts = forward.split_module(engine.module), []
    cache = forward.open_cache(graph, *ids.shape, forward.remembering(engine._attached))
    cuts = list(range(7, ids.shape[1]))
    for part in zip(np.split(ids, cuts, axis=1), np.split(mask, cuts, axis=1), strict=True):
        hidden, cache, *_ = forward.prefill(graph, *part, cache, engine._attached)
        parts.append(np.asarray(hidden))
    hidden = np.concatenate(parts, axis=1)
    return np.asarray(forward.logits(graph, hidden.reshape(-1, hidden.shape[-1]))).reshape(*ids.shape, -1)


def test_only_blocks_that_look_back_have_live_keys(jax_engine: JaxEngine) -> None:
    for kind, expected in zip(KINDS, ((), GLOBAL, (), ()), strict=True):
        jax_engine.inject(*blocks_of(jax_engine, **KINDS[kind]))
        assert forward.remembering(jax_engine._attached) == expected, kind


def test_a_closed_gate_is_the_plain_model(jax_engine: JaxEngine) -> None:
    assert isinstance(jax_engine, SequentialEngine)
    ids = random_ids(2, 13)
    plain = jax_engine.logits(ids)
    jax_engine.inject(*blocks_of(jax_engine, gate=0.0))
    np.testing.assert_array_equal(jax_engine.logits(ids), plain)
    compiled = forward._prefill._cache_size()
    jax_engine.set_gates({1: 0.5})
    assert np.abs(jax_engine.logits(ids) - plain).max() > 1e-2
    assert forward._prefill._cache_size() == compiled
    jax_engine.attach({}, {}, StaticSpec())
    np.testing.assert_array_equal(jax_engine.logits(ids), plain)


def test_blocks_without_a_place_are_refused(jax_engine: JaxEngine) -> None:
    static, blocks = blocks_of(jax_engine)
    own = blocks_of(jax_engine, source="own")[1]
    with pytest.raises(InputError, match=r"layers \[4\] have no place for a block"):
        jax_engine.inject({}, {4: blocks[1]})
    with pytest.raises(InputError, match=r"layers \[3\] have no place for a block or no block for their context"):
        jax_engine.inject(static, {1: blocks[1]})
    with pytest.raises(InputError, match=r"layers \[1, 3\] have a context, and source='own' reads the model's cache"):
        jax_engine.inject(static, own)
    with pytest.raises(InputError, match=r"layers \[0\] keep a window of keys only"):
        jax_engine.inject({}, {0: own[1]})
    with pytest.raises(InputError, match=r"layers \[1\] have no block; those with one are \[\]"):
        jax_engine.set_gates({1: 1.0})
