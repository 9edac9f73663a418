"""The JAX backend's attention layer against a brute-force float64 computation, and what it costs to compile."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from lyra.backends.jax_impl import JaxBackend  # noqa: E402
from lyra.backends.protocol import Attention, Backend, PlacedBackend, StaticLayer, get_backend  # noqa: E402
from lyra.spec import AttentionSpec, HeadSplit, InputError, QKNormSpec, RopeSpec, StaticSpec  # noqa: E402

E, HQ, HKV, D = 12, 4, 2, 4
POISON = np.float32(1e30)
ALIGNED, CUT, SCATTERED = HeadSplit((2, 3)), HeadSplit((1, 2), share_kv=True), HeadSplit((0, 3), share_kv=True)
ALL = HeadSplit((0, 1, 2, 3))


class Case(NamedTuple):
    """Arguments of a call."""

    x: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    static: StaticLayer | None


def make_spec(**changes: Any) -> AttentionSpec:
    fields: dict[str, Any] = {
        "hidden_size": E,
        "num_attention_heads": HQ,
        "num_key_value_heads": HKV,
        "head_dim": D,
        "scale": 0.4,
        "rope": RopeSpec(theta=100.0, factor=2.0),
    }
    return AttentionSpec(**(fields | changes))


def make_weights(spec: AttentionSpec, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.5, shape).astype(np.float32) / (1 if len(shape) == 1 else np.sqrt(shape[1]) / 2)
        for name, shape in spec.weight_shapes().items()
    }


def make_static(spec: AttentionSpec, rows: int, tokens: int, *, holes: bool, seed: int = 1) -> StaticLayer:
    rng = np.random.default_rng(seed)
    k, v = rng.normal(0, 1, (2, rows, len(spec.lyra_kv_heads), tokens, spec.head_dim)).astype(np.float32)
    mask = rng.random((rows, tokens)) < 0.6 if holes else np.ones((rows, tokens), bool)
    if holes:
        mask[:, 0] = True
        k[~np.broadcast_to(mask[:, None], k.shape[:3])] = POISON
        v[~np.broadcast_to(mask[:, None], v.shape[:3])] = -POISON
    positions = np.cumsum(rng.integers(1, 4, (rows, tokens)), axis=1)
    return StaticLayer(k, v, mask, np.where(mask, positions, 10**6))


def make_case(spec: AttentionSpec, tokens: int = 6, padding: str = "none", static_rows: int = 1, seed: int = 2) -> Case:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (2, tokens, spec.hidden_size)).astype(np.float32)
    mask = np.ones((2, tokens), bool)
    if padding == "left":
        mask[1, :2] = False
    elif padding == "right":
        mask[1, -2:] = False
    x[~mask] = POISON
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    static = make_static(spec, static_rows, 5, holes=True) if spec.lyra_q_heads and static_rows else None
    return Case(x, positions, mask, static)


def brute_force(spec: AttentionSpec, weights: dict[str, np.ndarray], case: Case) -> np.ndarray:
    """The layer in float64, one query at a time, in the spec's literal form: Lyra queries and keys sit at P + t."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    batch, tokens, _ = case.x.shape
    result = np.zeros((batch, tokens, spec.hidden_size))

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    def head(x: np.ndarray, name: str, index: int) -> np.ndarray:
        y = linear(x, f"{name}_proj")[index * spec.head_dim : (index + 1) * spec.head_dim]
        if spec.qk_norm is None or name == "v":
            return y
        return y / np.sqrt(np.mean(y**2) + spec.qk_norm.eps) * (1 + w[f"{name}_norm.weight"])

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        if spec.rope is None:
            return x
        half = spec.head_dim // 2
        angle = position * spec.rope.theta ** (-2 * np.arange(half) / spec.head_dim) / spec.rope.factor
        a, b = x[:half], x[half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])

    for row in range(batch):
        real = [t for t in range(tokens) if case.mask[row, t]]
        x, at = case.x[row].astype(np.float64), case.positions[row]
        for t in real:
            heads = []
            for h in range(spec.num_attention_heads):
                kv, lyra, shift, keys, values = h // spec.group_size, h in spec.lyra_q_heads, 0, [], []
                if lyra and case.static is not None:
                    own = min(row, case.static.k.shape[0] - 1)
                    seen, axis = np.flatnonzero(case.static.mask[own]), spec.lyra_kv_heads.index(kv)
                    places = case.static.positions[own]
                    shift = max(places[seen], default=-1) + 1 if spec.static.positions == "continue" else 0
                    keys += [turn(case.static.k[own, axis, j].astype(np.float64), places[j]) for j in seen]
                    values += [case.static.v[own, axis, j].astype(np.float64) for j in seen]
                for s in real:
                    inside = spec.sliding_window is None or at[s] > at[t] - spec.sliding_window
                    mode = spec.static.live if lyra else "causal"
                    if at[s] <= at[t] and inside and (mode == "causal" or (mode == "self" and s == t)):
                        keys.append(turn(head(x[s], "k", kv), at[s] + shift))
                        values.append(head(x[s], "v", kv))
                if not keys:
                    heads.append(np.zeros(spec.head_dim))
                    continue
                scores = np.array(keys) @ turn(head(x[t], "q", h), at[t] + shift) * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * np.tanh(scores / spec.softcap)
                p = np.exp(scores - scores.max())
                heads.append(p @ np.array(values) / p.sum())
            result[row, t] = linear(np.concatenate(heads), "o_proj")
    return result


def run(layer: Attention, case: Case, cuts: tuple[int, ...] = ()) -> np.ndarray:
    """The layer over the case's tokens, in one call or cut at `cuts`."""
    outputs, cache = [], None
    for start, stop in pairwise((0, *cuts, case.x.shape[1])):
        part = slice(start, stop)
        result = layer(
            case.x[:, part], positions=case.positions[:, part], mask=case.mask[:, part], static=case.static, cache=cache
        )
        outputs.append(result.output)
        cache = result.cache
    return np.concatenate(outputs, axis=1)


def check(spec: AttentionSpec, case: Case, cuts: tuple[int, ...] = ()) -> None:
    weights = make_weights(spec)
    expected = brute_force(spec, weights, case)
    got = run(JaxBackend().attention(spec, weights), case, cuts)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[case.mask], expected[case.mask], rtol=0, atol=2e-6 * np.abs(expected).max())


CUTS = {"one call": (), "chunks": (1, 4), "token by token": (1, 2, 3, 4, 5)}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("positions", ["continue", "overlay"])
@pytest.mark.parametrize("live", ["causal", "self", "none"])
@pytest.mark.parametrize("split", [ALIGNED, CUT, SCATTERED, ALL], ids=["aligned", "cut", "scattered", "all"])
def test_modes_splits_and_cuts(split: HeadSplit, live: Any, positions: Any, cuts: tuple[int, ...]) -> None:
    spec = make_spec(split=split, static=StaticSpec(live=live, positions=positions))
    check(spec, make_case(spec, padding="left", static_rows=2), cuts)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("static_rows", [0, 1, 2])
def test_padding_and_context_batch(static_rows: int, padding: str, cuts: tuple[int, ...]) -> None:
    spec = make_spec(split=CUT)
    check(spec, make_case(spec, padding=padding, static_rows=static_rows), cuts)


@pytest.mark.parametrize("live", ["self", "none"])
def test_live_modes_hold_without_a_context(live: Any) -> None:
    spec = make_spec(split=SCATTERED, static=StaticSpec(live=live))
    check(spec, make_case(spec, padding="left", static_rows=0), (2, 3))


VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 3},
    "window of one": {"sliding_window": 1},
    "softcap": {"softcap": 0.7, "split": CUT},
    "bias": {"bias": True, "split": CUT},
    "no norm": {"qk_norm": None, "split": CUT},
    "no rope": {"rope": None, "split": CUT},
    "neither": {"qk_norm": None, "rope": None, "split": ALL},
    "large eps": {"qk_norm": QKNormSpec(eps=0.3), "split": CUT},
    "multi query": {"num_key_value_heads": 1, "split": SCATTERED},
    "multi head": {"num_key_value_heads": 4, "split": HeadSplit((0, 2))},
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS.keys())
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants(changes: dict[str, Any], cuts: tuple[int, ...]) -> None:
    spec = make_spec(**changes)
    check(spec, make_case(spec, padding="left"), cuts)


def test_cache_outgrows_its_capacity() -> None:
    spec = make_spec(split=CUT)
    check(spec, make_case(spec, tokens=21, padding="left"), (15, 17, 18))


def test_far_positions() -> None:
    spec = make_spec(split=ALIGNED, rope=RopeSpec(theta=1e6, factor=8.0))
    case = make_case(spec)
    weights = make_weights(spec)
    far = case._replace(positions=case.positions + 131_000)
    expected, got = brute_force(spec, weights, far), run(JaxBackend().attention(spec, weights), far)
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-3 * np.abs(expected).max())


def test_masked_slots_have_no_influence() -> None:
    spec = make_spec(split=CUT)
    layer = JaxBackend().attention(spec, make_weights(spec))
    case = make_case(spec, padding="left")
    assert case.static is not None
    hidden = ~np.broadcast_to(case.static.mask[:, None], case.static.k.shape[:3])
    k, v, x = case.static.k.copy(), case.static.v.copy(), case.x.copy()
    k[hidden], v[hidden], x[~case.mask] = 0.5, 3.0, -7.0
    clean = case._replace(x=x, static=case.static._replace(k=k, v=v))
    np.testing.assert_array_equal(run(layer, clean, (3,))[case.mask], run(layer, case, (3,))[case.mask])


def test_later_tokens_have_no_influence() -> None:
    spec = make_spec(split=CUT)
    layer = JaxBackend().attention(spec, make_weights(spec))
    case = make_case(spec)
    poisoned = case._replace(x=np.concatenate([case.x[:, :4], np.full_like(case.x[:, 4:], POISON)], axis=1))
    np.testing.assert_array_equal(run(layer, poisoned)[:, :4], run(layer, case)[:, :4])


@pytest.mark.parametrize("context", ["absent", "empty", "hidden"])
def test_a_head_that_sees_nothing_gives_exactly_zero(context: str) -> None:
    spec = make_spec(split=ALIGNED, static=StaticSpec(live="none"))
    static = None if context == "absent" else make_static(spec, 1, 0 if context == "empty" else 4, holes=False)
    if context == "hidden":
        assert static is not None
        static = static._replace(mask=np.zeros((1, 4), bool), v=np.full_like(static.v, POISON))
    case = make_case(spec, static_rows=0)
    layer = JaxBackend().attention(spec, make_weights(spec))
    heads = layer(case.x, positions=case.positions, static=static, trace=True).trace["heads"]
    np.testing.assert_array_equal(heads[:, :, 2:], 0.0)
    assert np.abs(heads[:, :, :2]).min() > 0


def test_trace_names_and_shapes() -> None:
    for spec in (make_spec(split=CUT), make_spec(qk_norm=None), make_spec(rope=None)):
        case = make_case(spec)
        layer = JaxBackend().attention(spec, make_weights(spec))
        result = layer(case.x, positions=case.positions, static=case.static, trace=True)
        assert tuple(result.trace) == spec.trace_names()
        for name, value in result.trace.items():
            heads = HQ if name[0] in "qh" else HKV
            assert value.shape == ((2, 6, E) if name == "output" else (2, 6, heads, D)), name
            assert value.dtype == np.float32
        np.testing.assert_array_equal(result.trace["output"], result.output)
        assert layer(case.x, positions=case.positions, static=case.static).trace == {}


def test_same_call_same_bits_and_the_given_cache_is_unchanged() -> None:
    spec = make_spec(split=CUT)
    layer = JaxBackend().attention(spec, make_weights(spec))
    case = make_case(spec, padding="left")
    cache = layer(case.x[:, :4], positions=case.positions[:, :4], mask=case.mask[:, :4], static=case.static).cache
    tail = {"positions": case.positions[:, 4:], "mask": case.mask[:, 4:], "static": case.static, "cache": cache}
    first = layer(case.x[:, 4:], **tail).output
    layer(case.x[:, 4:] * 100, **tail)
    np.testing.assert_array_equal(layer(case.x[:, 4:], **tail).output, first)


def test_reorder_and_crop() -> None:
    spec = make_spec(split=CUT)
    layer = JaxBackend().attention(spec, make_weights(spec))
    case = make_case(spec, tokens=7, padding="left", static_rows=1)
    five = layer(case.x[:, :5], positions=case.positions[:, :5], mask=case.mask[:, :5], static=case.static).cache
    rows = [1, 0, 1]
    tail = {"positions": case.positions[:, 3:5], "mask": case.mask[:, 3:5]}
    expected = run(layer, case, (3,))[:, 3:5]
    cropped = layer(case.x[:, 3:5], **tail, static=case.static, cache=layer.crop(five, 3)).output
    np.testing.assert_allclose(cropped, expected, rtol=0, atol=2e-6)
    chosen = layer.crop(layer.reorder(five, rows), 3)
    reordered = layer(
        case.x[rows, 3:5], positions=tail["positions"][rows], mask=tail["mask"][rows], static=case.static, cache=chosen
    ).output
    np.testing.assert_allclose(reordered, expected[rows], rtol=0, atol=2e-6)


def test_refusals() -> None:
    spec = make_spec(split=CUT)
    layer = JaxBackend().attention(spec, make_weights(spec))
    case = make_case(spec)
    cache = layer(case.x, positions=case.positions).cache
    with pytest.raises(InputError, match="the cache has 2 rows, x has 1"):
        layer(case.x[:1], positions=case.positions[:1], cache=cache)
    with pytest.raises(InputError, match="missing"):
        JaxBackend().attention(spec, {})


def test_the_backend_is_found_by_name() -> None:
    backend = get_backend("jax")
    assert isinstance(backend, Backend)
    assert backend.name == "jax"
    spec = make_spec()
    assert isinstance(backend.attention(spec, make_weights(spec)), Attention)


def test_it_says_what_it_computes_on() -> None:
    backend = get_backend("jax")
    assert isinstance(backend, PlacedBackend)
    assert backend.hardware == ("CPU" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind)


@pytest.fixture
def compilations(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """How many times the layer call was compiled since the test began, as JAX itself logs it.

    A test that uses this takes shapes that no other test has.
    """
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        yield lambda: sum("Finished XLA compilation of jit(call_layer)" in line for line in caplog.messages)


def test_numbers_and_heads_of_a_spec_do_not_compile_again(compilations: Callable[[], int]) -> None:
    """One structure and one set of shapes is one compiled function, whatever the numbers and the heads are."""
    splits = [HeadSplit((2, 3)), HeadSplit((0, 1)), HeadSplit((0,), share_kv=True), HeadSplit((3,), share_kv=True)]
    for i, split in enumerate(splits * 3):
        spec = make_spec(
            split=split,
            scale=0.1 + i,
            softcap=1.0 + i,
            bias=True,
            qk_norm=QKNormSpec(eps=10.0 ** -(i + 1)),
            rope=RopeSpec(theta=10.0 + i, factor=1.0 + i),
            static=StaticSpec(positions="overlay" if i % 2 else "continue"),
        )
        case = make_case(spec, tokens=19, seed=i)
        layer = JaxBackend().attention(spec, make_weights(spec, seed=i))
        layer(case.x, positions=case.positions + i, mask=case.mask, static=case.static)
    assert compilations() == 1


def test_close_lengths_share_one_function(compilations: Callable[[], int]) -> None:
    """5 to 8 tokens, 3 to 16 static slots, with and without a window and a live mode of its own: one function."""
    for tokens, live, slots in ((5, "causal", 3), (6, "self", 16), (7, "none", 9), (8, "causal", 4)):
        spec = make_spec(hidden_size=13, split=ALIGNED, static=StaticSpec(live=live))
        case = make_case(spec, tokens=tokens)
        static = make_static(spec, 1, slots, holes=False)
        layer = JaxBackend().attention(spec, make_weights(spec))
        assert layer(case.x, positions=case.positions, static=static).output.shape[1] == tokens
    assert compilations() == 1


def test_decoding_compiles_once_per_doubling(compilations: Callable[[], int]) -> None:
    spec = make_spec(hidden_size=11, sliding_window=4)
    layer = JaxBackend().attention(spec, make_weights(spec))
    cache = None
    for t in range(40):
        cache = layer(np.ones((1, 1, 11), np.float32), positions=np.array([[t]]), cache=cache).cache
    assert compilations() == 3, "one each for 16, 32 and 64 slots"


def test_runs_without_torch_and_transformers() -> None:
    code = """
        import sys
        for name in ("torch", "transformers", "accelerate"):
            sys.modules[name] = None
        import numpy as np
        from lyra.backends.jax_impl import JaxBackend
        from lyra.spec import AttentionSpec
        assert "flax" not in sys.modules, "flax is for whole models only"
        spec = AttentionSpec(4, 2, 1, 4, 0.5)
        weights = {name: np.ones(shape, np.float32) for name, shape in spec.weight_shapes().items()}
        result = JaxBackend().attention(spec, weights)(np.ones((1, 2, 4), np.float32), positions=np.array([[0, 1]]))
        assert result.output.shape == (1, 2, 4)
        assert "lyra.spec.reference" not in sys.modules and "lyra.backends.torch_impl" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
