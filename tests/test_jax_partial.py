"""The attention core of the JAX backend, its tiles of queries, and what a compiled step does with its cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lyra.backends.jax_impl import attention_backend, layer, partial
from lyra.backends.jax_impl.attention_backend import JaxAttention
from lyra.backends.jax_impl.cache import LiveCache, LiveKeys, empty_cache
from lyra.backends.jax_impl.partial import finish, partial_attention
from lyra.backends.jax_impl.rope import cos_sin, turn_once
from lyra.backends.jax_impl.shapes import SMALLEST_TOKENS, round_up
from lyra.conformance.case_sizes import LARGE
from lyra.spec import AttentionSpec, HeadSplit, QKNormSpec, RopeSpec, StaticSpec

QUERIES, KEYS, WIDTH = 10, 12, 8
CUBLAS_WORKSPACE = 2**25  # bytes, which XLA sets aside on a GPU whatever is multiplied
GROUP = 2
SHAPES = {
    "none": None,
    "by key": (2, 1, 1, 1, KEYS),
    "by query": (2, 1, 1, QUERIES, KEYS),
    "by head": (2, 3, GROUP, QUERIES, KEYS),
}


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


def attention(queries: int, keys: int, visible: np.ndarray | None) -> Any:
    given = random(2, 3, GROUP, queries, WIDTH), random(2, 3, WIDTH, keys), random(2, 3, keys, WIDTH)
    shown = None if visible is None else jnp.asarray(visible)
    return finish(partial_attention(*map(jnp.asarray, given), shown, 0.4, None))


@pytest.mark.parametrize("queries_a_tile", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_queries_in_tiles_see_what_they_see_at_once(
    shape: tuple[int, ...] | None, queries_a_tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible = None if shape is None else random(*shape) > 0
    at_once = attention(QUERIES, KEYS, visible)
    lengths: list[int] = []
    tile = partial._tile

    def noted(query: Any, *rest: Any) -> Any:
        lengths.append(query.shape[3])
        return tile(query, *rest)

    monkeypatch.setattr(partial, "_tile", noted)
    monkeypatch.setattr(partial, "SCORES_PER_TILE", queries_a_tile * 2 * 3 * GROUP * KEYS)
    np.testing.assert_allclose(attention(QUERIES, KEYS, visible), at_once, rtol=2e-6, atol=2e-6)
    assert set(lengths) == {queries_a_tile}


def test_memory_does_not_grow_with_tokens_times_slots() -> None:
    """Scratch memory of a compiled call over 8,192 slots: of four times the queries, four times those, and no more."""

    def scratch(queries: int) -> int:
        given = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 1, 1, queries, 4), (1, 1, 4, 8192)))
        values = jax.ShapeDtypeStruct((1, 1, 8192, 4), jnp.float32)
        compiled = jax.jit(lambda *given: partial_attention(*given, None, 0.5, None)).lower(*given, values).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    few, many = scratch(1024), scratch(4096)
    assert many - few < 3 * 3072 * 8 * 4  # a row has 4 values, a maximum and a sum
    assert few > partial.SCORES_PER_TILE  # bytes: there is a tile of scores in it


def test_generated_cases_are_long_enough_for_tiles() -> None:
    sizes = LARGE["5-million-scores"]
    tokens = round_up(max(sizes.calls), SMALLEST_TOKENS)
    assert sizes.batch * sizes.heads[0] * tokens * sizes.context_tokens > partial.SCORES_PER_TILE


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 4)])
def test_a_step_writes_to_its_cache_in_place(shape: tuple[int, int]) -> None:
    """No copy of the cache is made on the way, whatever axes have the length 1."""
    cache = empty_cache(*shape, WIDTH, 4096)
    new = LiveKeys(
        random(*shape, WIDTH, 1),
        random(*shape, 1, WIDTH),
        np.ones((shape[0], 1), bool),
        np.zeros((shape[0], 1), np.int32),
    )

    @functools.partial(jax.jit, donate_argnames="cache")
    def step(query: Any, new: LiveKeys, cache: LiveCache) -> Any:
        live, after = cache.append(new)
        seen = live.mask[:, None, None, None]
        return finish(partial_attention(query, live.keys, live.values, seen, 0.4, None)), after

    compiled = step.lower(random(*shape, 2, 1, WIDTH), new, cache).compile()
    memory, held = compiled.memory_analysis(), cache.keys.nbytes + cache.values.nbytes
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 2 + CUBLAS_WORKSPACE * (jax.default_backend() == "gpu")
    output, after = compiled(random(*shape, 2, 1, WIDTH), new, jax.device_put(cache))
    np.testing.assert_array_equal(output[:, :, 0], np.asarray(new.values))
    assert after.length == 1


def test_a_turn_for_all_layers_is_each_layers_own() -> None:
    positions, frequencies = np.array([[0, 1, 5, 131_071]], np.int32), np.array([1.0, 0.01], np.float32)
    for ours, theirs in zip(
        jax.jit(turn_once)(positions, frequencies), jax.jit(cos_sin)(positions, frequencies), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("live", "window"), [("causal", None), ("self", None), ("causal", 9)])
def test_tokens_in_parts_see_what_they_see_at_once(
    live: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a cache with free slots, with padding; each part is given the keys up to its last token, and free ones."""
    spec = AttentionSpec(
        hidden_size=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=WIDTH,
        scale=0.4,
        sliding_window=window,
        qk_norm=QKNormSpec(eps=1e-6),
        rope=RopeSpec(theta=1e4),
        split=HeadSplit(lyra_q_heads=(1, 2) if live == "self" else (), share_kv=True),
        static=StaticSpec(live=live),
    )
    weights = {name: random(*shape) for name, shape in spec.weight_shapes().items()}
    x, mask = random(2, 37, 12), np.ones((2, 37), bool)
    mask[0, :5] = False
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    keys: list[int] = []
    attend = layer.partial_attention

    def noted(query: Any, given: Any, *rest: Any) -> Any:
        keys.append(given.shape[-1])
        return attend(query, given, *rest)

    def run() -> np.ndarray:
        attention_backend.call_layer.clear_cache()
        attention, cache, outputs = JaxAttention(spec, weights), None, []
        for part in (slice(0, 3), slice(3, 37)):
            result = attention(x[:, part], positions=positions[:, part], mask=mask[:, part], cache=cache)
            outputs.append(result.output)
            cache = result.cache
        return np.concatenate(outputs, axis=1)

    monkeypatch.setattr(layer, "PARTS", 1)
    at_once = run()
    monkeypatch.setattr(layer, "partial_attention", noted)
    monkeypatch.setattr(layer, "PARTS", 4)
    in_parts = run()
    attention_backend.call_layer.clear_cache()
    np.testing.assert_allclose(in_parts[mask], at_once[mask], rtol=2e-5, atol=2e-5)
    assert keys == [16, 80, 96, 112, 128]  # 34 tokens, padded to 64, behind 3 of a cache that grows to 128 slots


def test_generated_cases_have_tokens_for_several_parts() -> None:
    assert max(max(sizes.calls) for sizes in LARGE.values()) >= layer.PARTS * layer.TOKENS_A_PART
