"""The Hugging Face oracle against an independent brute force: float64, one query head and one token at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from small_layers import assert_real_tokens_close

from lyra.backends.protocol import StaticLayer, check_backend, get_backend
from lyra.conformance.oracles.hf import HuggingFaceOracle
from lyra.spec import AttentionSpec, HeadSplit, InputError, QKNormSpec, RopeSpec, SpecError, StaticSpec

Weights = Mapping[str, np.ndarray]
BASE = AttentionSpec(
    hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8, scale=0.3, qk_norm=QKNormSpec(eps=1e-6)
)
SPLITS = {
    "none": HeadSplit.none(),
    "aligned": HeadSplit(lyra_q_heads=(2, 3)),
    "cut": HeadSplit(lyra_q_heads=(1, 2, 3), share_kv=True),
    "cut both": HeadSplit(lyra_q_heads=(0, 3), share_kv=True),
    "all": HeadSplit(lyra_q_heads=(0, 1, 2, 3)),
}
MODES = list(itertools.product(("causal", "self", "none"), ("continue", "overlay")))
B, T, S = 3, 5, 6
ORACLE = HuggingFaceOracle()


def random_weights(spec: AttentionSpec, rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = spec.weight_shapes()
    widths = {name: 0.5 if "norm" in name or "bias" in name else shape[-1] ** -0.5 for name, shape in shapes.items()}
    return {name: (widths[name] * rng.standard_normal(shapes[name])).astype(np.float32) for name in shapes}


def random_context(spec: AttentionSpec, rng: np.random.Generator, batch: int, span: int = 18) -> StaticLayer:
    """Positions below `span`, unordered; hidden slots hold poison and the highest positions; the last row is empty."""
    shape = (batch, len(spec.lyra_kv_heads), S, spec.head_dim)
    k, v = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    mask = rng.random((batch, S)) < 0.6
    mask[0, :2] = (True, False)
    if batch > 1:
        mask[-1] = False
    positions = np.stack([rng.permutation(span)[:S] for _ in range(batch)])
    positions[~mask] += 50
    hidden = np.broadcast_to(~mask[:, None, :, None], shape)
    k[hidden], v[hidden] = 3e38, -3e38
    return StaticLayer(k, v, mask, positions)


def random_call(
    spec: AttentionSpec, rng: np.random.Generator, far: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, positions and mask with 0, 1 and 2 tokens of left padding, which hold poison."""
    x = rng.standard_normal((B, T, spec.hidden_size)).astype(np.float32)
    mask = np.arange(T) >= np.arange(B)[:, None] % 3
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0) + far
    x[~mask] = 3e38
    return x, positions, mask


def norm(z: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    return z / math.sqrt(float(np.mean(z * z)) + eps) * (1 + w)


def turn(z: np.ndarray, position: int, rope: RopeSpec) -> np.ndarray:
    """Pairs (i, i + D/2) as complex numbers, turned by the angle of the clause."""
    half = len(z) // 2
    angles = position / rope.factor * np.array([rope.theta ** (-2 * i / len(z)) for i in range(half)])
    pairs = (z[:half] + 1j * z[half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag])


def brute_force(
    spec: AttentionSpec,
    weights: Weights,
    x: np.ndarray,
    positions: np.ndarray,
    mask: np.ndarray,
    static: StaticLayer | None = None,
) -> np.ndarray:
    """[B,T,E] float64; 0 at padding."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    D, rope, eps = spec.head_dim, spec.rope, spec.qk_norm.eps
    output = np.zeros(x.shape)

    def project(name: str, token: np.ndarray, head: int) -> np.ndarray:
        rows = slice(head * D, (head + 1) * D)
        bias = w[f"{name}.bias"][rows] if spec.bias else 0.0
        return w[f"{name}.weight"][rows] @ token.astype(np.float64) + bias

    for b, t in np.argwhere(mask):
        heads = []
        for head in range(spec.num_attention_heads):
            lyra = head in spec.lyra_q_heads
            kv = head // (spec.num_attention_heads // spec.num_key_value_heads)
            keys, values, start = [], [], 0
            if lyra and static is not None:
                row, group = (0 if static.k.shape[0] == 1 else b), spec.lyra_kv_heads.index(kv)
                seen = [s for s in range(static.k.shape[2]) if static.mask[row, s]]
                if seen and spec.static.positions == "continue":
                    start = 1 + max(int(static.positions[row, s]) for s in seen)
                for s in seen:
                    keys.append(turn(static.k[row, group, s].astype(np.float64), static.positions[row, s], rope))
                    values.append(static.v[row, group, s].astype(np.float64))
            for u in range(t + 1):
                distance = positions[b, t] - positions[b, u]
                in_window = spec.sliding_window is None or distance < spec.sliding_window
                by_mode = not lyra or {"causal": True, "self": u == t, "none": False}[spec.static.live]
                if mask[b, u] and in_window and by_mode:
                    k = norm(project("k_proj", x[b, u], kv), w["k_norm.weight"], eps)
                    keys.append(turn(k, start + positions[b, u], rope))
                    values.append(project("v_proj", x[b, u], kv))
            q = norm(project("q_proj", x[b, t], head), w["q_norm.weight"], eps)
            q = turn(q, start + positions[b, t], rope)
            scores = np.array([spec.scale * float(q @ k) for k in keys])
            if spec.softcap is not None:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            weight = np.exp(scores - scores.max(initial=0.0))
            mean = sum((p * v for p, v in zip(weight / weight.sum(), values, strict=True)), np.zeros(D))
            heads.append(mean if keys else np.zeros(D))
        output[b, t] = w["o_proj.weight"] @ np.concatenate(heads) + (w["o_proj.bias"] if spec.bias else 0.0)
    return output


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize(("live", "positions"), MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_every_split_and_mode_with_a_context(split: str, live: str, positions: str, batch: int) -> None:
    rng = np.random.default_rng(1)
    spec = BASE.replace(split=SPLITS[split], static=StaticSpec(live, positions))
    weights, static = random_weights(spec, rng), random_context(spec, rng, batch)
    x, at, mask = random_call(spec, rng)
    given = static if spec.lyra_q_heads else None
    result = ORACLE.attention(spec, weights)(x, positions=at, mask=mask, static=given)
    assert_real_tokens_close(result.output, brute_force(spec, weights, x, at, mask, given), mask)
    assert result.cache is None
    assert result.trace == {}


@pytest.mark.parametrize("live", ["causal", "self", "none"])
@pytest.mark.parametrize("split", ["aligned", "cut both", "all"])
def test_without_a_context(split: str, live: str) -> None:
    rng = np.random.default_rng(2)
    spec = BASE.replace(split=SPLITS[split], static=StaticSpec(live=live))
    weights = random_weights(spec, rng)
    x, at, mask = random_call(spec, rng)
    got = ORACLE.attention(spec, weights)(x, positions=at, mask=mask).output
    assert_real_tokens_close(got, brute_force(spec, weights, x, at, mask), mask)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True},
        {"softcap": 0.7},
        {"rope": RopeSpec(theta=10_000.0, factor=8.0)},
        {"qk_norm": QKNormSpec(eps=0.5)},
        {"scale": 168**-0.5},
        {"scale": 3.0},
        {"num_key_value_heads": 1, "split": HeadSplit(lyra_q_heads=(1, 3), share_kv=True)},
        {"num_key_value_heads": 4, "split": HeadSplit(lyra_q_heads=(1, 3))},
        {"hidden_size": 10},
    ],
    ids=str,
)
def test_every_field_of_the_spec(changes: dict[str, object]) -> None:
    rng = np.random.default_rng(3)
    spec = BASE.replace(**({"split": SPLITS["cut"]} | changes))
    weights, static = random_weights(spec, rng), random_context(spec, rng, B)
    x, at, mask = random_call(spec, rng)
    got = ORACLE.attention(spec, weights)(x, positions=at, mask=mask, static=static).output
    assert_real_tokens_close(got, brute_force(spec, weights, x, at, mask, static), mask, atol=2e-5)


@pytest.mark.parametrize("positions", ["continue", "overlay"])
def test_far_positions(positions: str) -> None:
    rng = np.random.default_rng(4)
    spec = BASE.replace(split=SPLITS["cut"], static=StaticSpec(positions=positions))
    weights, static = random_weights(spec, rng), random_context(spec, rng, B, span=60_000)
    x, at, mask = random_call(spec, rng, far=60_000)
    got = ORACLE.attention(spec, weights)(x, positions=at, mask=mask, static=static).output
    # a float32 frequency is right to about 2⁻²², so an angle of 120,000 · 0.03 radians to about 1e-3
    assert_real_tokens_close(got, brute_force(spec, weights, x, at, mask, static), mask, atol=1e-3)
    off_by_one = static._replace(positions=static.positions + (static.positions % 2))
    assert np.abs(got - brute_force(spec, weights, x, at, mask, off_by_one))[mask].max() > 0.03


@pytest.mark.parametrize("window", [1, 2, 4])
def test_window(window: int) -> None:
    rng = np.random.default_rng(5)
    spec = BASE.replace(sliding_window=window, rope=RopeSpec(theta=10_000.0))
    weights = random_weights(spec, rng)
    x, at, mask = random_call(spec, rng)
    want = brute_force(spec, weights, x, at, mask)
    assert_real_tokens_close(ORACLE.attention(spec, weights)(x, positions=at, mask=mask).output, want, mask)
    assert_real_tokens_close(ORACLE.plain(spec, weights, x, at, mask), want, mask)


def test_a_window_counts_positions_where_they_have_gaps() -> None:
    rng = np.random.default_rng(6)
    spec = BASE.replace(sliding_window=3)
    weights = random_weights(spec, rng)
    x, at, mask = random_call(spec, rng)
    at = at * 2
    assert_real_tokens_close(
        ORACLE.attention(spec, weights)(x, positions=at, mask=mask).output,
        brute_force(spec, weights, x, at, mask),
        mask,
    )
    with pytest.raises(InputError, match=r"row 0: the real tokens sit at positions \[0, 2, 4, 6, 8\]"):
        ORACLE.plain(spec, weights, x, at, mask)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_plain_forward_is_the_composition_without_a_context(split: str, softcap: float | None) -> None:
    rng = np.random.default_rng(7)
    spec = BASE.replace(split=SPLITS[split], softcap=softcap)
    weights = random_weights(spec, rng)
    x, at, mask = random_call(spec, rng)
    plain = ORACLE.plain(spec, weights, x, at, mask)
    assert_real_tokens_close(plain, brute_force(spec, weights, x, at, mask), mask)
    assert_real_tokens_close(ORACLE.attention(spec, weights)(x, positions=at, mask=mask).output, plain, mask, atol=1e-6)
    unpadded = np.broadcast_to(np.arange(T), (B, T))
    x = rng.standard_normal(x.shape).astype(np.float32)
    composed = ORACLE.attention(spec, weights)(x, positions=unpadded).output
    assert_real_tokens_close(ORACLE.plain(spec, weights, x, unpadded), composed, np.ones((B, T), bool), atol=1e-6)


def test_a_row_that_sees_nothing_gives_exactly_zero() -> None:
    rng = np.random.default_rng(8)
    spec = BASE.replace(split=SPLITS["all"], static=StaticSpec(live="none"))
    weights, static = random_weights(spec, rng), random_context(spec, rng, B)
    x, at, mask = random_call(spec, rng)
    got = ORACLE.attention(spec, weights)(x, positions=at, mask=mask, static=static).output
    assert (got[-1] == 0).all()
    assert (got[0] != 0).any()
    nothing = StaticLayer(*(part[:, :, :0] for part in static[:2]), *(part[:, :0] for part in static[2:]))
    assert (ORACLE.attention(spec, weights)(x, positions=at, mask=mask, static=nothing).output == 0).all()


def test_weights_changed_in_place_are_seen_and_modules_are_reused() -> None:
    rng = np.random.default_rng(9)
    oracle, weights = HuggingFaceOracle(), random_weights(BASE, rng)
    x, at, mask = random_call(BASE, rng)
    first = oracle.attention(BASE, weights)
    before = first(x, positions=at, mask=mask).output
    weights["o_proj.weight"] *= 2
    second = oracle.attention(BASE, weights)
    assert second._modules is first._modules
    np.testing.assert_array_equal(second(x, positions=at, mask=mask).output, 2 * before)


@pytest.mark.parametrize("kind", ["float64", "read-only"])
def test_weights_that_must_be_copied_are_never_stale(kind: str) -> None:
    rng = np.random.default_rng(10)
    oracle, shared = HuggingFaceOracle(), random_weights(BASE, rng)
    x, at, mask = random_call(BASE, rng)
    before = oracle.attention(BASE, shared)(x, positions=at, mask=mask).output
    weights = {name: value.astype(np.float64) if kind == "float64" else value.view() for name, value in shared.items()}
    for array in weights.values():
        array.flags.writeable = kind == "float64"
    np.testing.assert_array_equal(oracle.attention(BASE, weights)(x, positions=at, mask=mask).output, before)
    (weights if kind == "float64" else shared)["o_proj.weight"] *= 2
    np.testing.assert_array_equal(oracle.attention(BASE, weights)(x, positions=at, mask=mask).output, 2 * before)


def test_what_is_out_of_reach_is_refused_with_the_reason() -> None:
    softly = {"qk_norm": None, "softcap": 2.0, "sliding_window": 3}
    for changes, reason in ((softly, "always norms"), ({"rope": None}, "always rotates")):
        spec = BASE.replace(**changes)
        assert reason in (ORACLE.supports(spec) or "")
        with pytest.raises(SpecError, match=reason):
            ORACLE.attention(spec, random_weights(spec, np.random.default_rng(11)))
    assert ORACLE.supports(BASE.replace(softcap=1.0, bias=True, sliding_window=3, hidden_size=10)) is None


def test_cache_and_trace_are_refused() -> None:
    rng = np.random.default_rng(12)
    attention = ORACLE.attention(BASE, random_weights(BASE, rng))
    x, at, mask = random_call(BASE, rng)
    with pytest.raises(InputError, match="neither a cache nor a trace"):
        attention(x, positions=at, mask=mask, cache=object())
    with pytest.raises(InputError, match="neither a cache nor a trace"):
        attention(x, positions=at, mask=mask, trace=True)


def test_it_is_a_backend_by_name() -> None:
    found = check_backend(get_backend("lyra.conformance.oracles.hf:HuggingFaceOracle"))
    assert (found.name, found.capabilities) == ("huggingface", frozenset({"static"}))
