"""The PyTorch backend at the attention level, against a literal float64 brute force written here."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from lyra.backends.protocol import PlacedBackend, get_backend
from lyra.backends.torch_impl import TorchBackend, partial
from lyra.spec import AttentionSpec, HeadSplit, InputError, QKNormSpec, RopeSpec, StaticSpec
from lyra.spec.inputs import StaticLayer

SIZES = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
SPLITS = {
    "none": HeadSplit.none(),
    "last": HeadSplit((4, 5)),
    "apart": HeadSplit((0, 1, 4, 5)),
    "cut": HeadSplit((0, 3, 5), share_kv=True),
    "all": HeadSplit(tuple(range(6))),
}
ATOL = 2e-5


def make_spec(**changes) -> AttentionSpec:
    fields = SIZES | {"scale": 0.3, "qk_norm": QKNormSpec(1e-6), "rope": RopeSpec(10_000.0, 2.0)} | changes
    return AttentionSpec(**fields)


def make_weights(spec: AttentionSpec, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        name: (random.normal(size=shape) * (0.3 if len(shape) == 2 else 0.5)).astype(np.float32)
        for name, shape in spec.weight_shapes().items()
    }


def make_static(spec: AttentionSpec, batch: int, tokens: int, seed: int = 1, holes: bool = True) -> StaticLayer:
    random = np.random.default_rng(seed)
    k, v = random.normal(size=(2, batch, len(spec.lyra_kv_heads), tokens, spec.head_dim)).astype(np.float32)
    mask = random.random((batch, tokens)) < 0.6 if holes else np.ones((batch, tokens), dtype=bool)
    positions = np.cumsum(random.integers(1, 4, (batch, tokens)), axis=1)
    k[np.broadcast_to(~mask[:, None, :, None], k.shape)] = 1e30
    v[np.broadcast_to(~mask[:, None, :, None], v.shape)] = -1e30
    return StaticLayer(k, v, mask, positions)


def make_rows(lengths: tuple[int, ...], tokens: int, side: str, width: int, seed: int = 2):
    """x, positions and mask of rows of different lengths; padding holds 1e30."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(len(lengths), tokens, width)).astype(np.float32)
    slots = np.arange(tokens)[None]
    length = np.array(lengths)[:, None]
    mask = slots >= tokens - length if side == "left" else slots < length
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0)
    x[~mask] = 1e30
    return x, positions, mask


def turn(vector: np.ndarray, position: float, rope: RopeSpec | None) -> np.ndarray:
    if rope is None:
        return vector
    half = len(vector) // 2
    angle = position * rope.theta ** (-2 * np.arange(half) / len(vector)) / rope.factor
    first, second = vector[:half], vector[half:]
    return np.concatenate(
        (first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle))
    )


def brute_force(spec, weights, x, positions, mask, static=None) -> np.ndarray:
    """The clauses read literally, in float64, one query and one head at a time; [B,T,E], NaN at padding."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    D, group = spec.head_dim, spec.group_size
    result = np.full(x.shape, np.nan)
    for b in range(len(x)):
        real = np.flatnonzero(mask[b])
        c = b if static is not None and len(static.k) > 1 else 0
        shown = np.flatnonzero(static.mask[c]) if static is not None else []
        past = max((static.positions[c, j] + 1 for j in shown), default=0) if spec.static.positions == "continue" else 0

        def head(name, norm, t, h, b=b):
            row = slice(h * D, h * D + D)
            y = w[f"{name}.weight"][row] @ x[b, t].astype(np.float64) + (w[f"{name}.bias"][row] if spec.bias else 0)
            if norm and spec.qk_norm:
                y = y / np.sqrt(np.mean(y * y) + spec.qk_norm.eps) * (1 + w[f"{norm}.weight"])
            return y

        for t in real:
            heads = []
            for h in range(spec.num_attention_heads):
                lyra = h in spec.lyra_q_heads
                shift = past if lyra else 0
                q = turn(head("q_proj", "q_norm", t, h), positions[b, t] + shift, spec.rope)
                seen = [s for s in real if positions[b, s] <= positions[b, t]]
                if spec.sliding_window:
                    seen = [s for s in seen if positions[b, s] > positions[b, t] - spec.sliding_window]
                if lyra and spec.static.live == "self":
                    seen = [t]
                if lyra and spec.static.live == "none":
                    seen = []
                keys = [turn(head("k_proj", "k_norm", s, h // group), positions[b, s] + shift, spec.rope) for s in seen]
                values = [head("v_proj", None, s, h // group) for s in seen]
                if lyra and static is not None:
                    g = spec.lyra_kv_heads.index(h // group)
                    keys += [
                        turn(static.k[c, g, j].astype(np.float64), static.positions[c, j], spec.rope) for j in shown
                    ]
                    values += [static.v[c, g, j].astype(np.float64) for j in shown]
                if not keys:
                    heads.append(np.zeros(D))
                    continue
                scores = np.array(keys) @ q * spec.scale
                if spec.softcap:
                    scores = spec.softcap * np.tanh(scores / spec.softcap)
                p = np.exp(scores - scores.max())
                heads.append(p @ np.array(values) / p.sum())
            result[b, t] = w["o_proj.weight"] @ np.concatenate(heads) + (w["o_proj.bias"] if spec.bias else 0)
    return result


def check(spec, static=None, lengths=(5, 3), tokens=5, side="left", chunks=None):
    weights = make_weights(spec)
    x, positions, mask = make_rows(lengths, tokens, side, spec.hidden_size)
    layer = TorchBackend().attention(spec, weights)
    expected = brute_force(spec, weights, x, positions, mask, static)
    outputs, cache, start = [], None, 0
    for size in chunks or [tokens]:
        part = slice(start, start + size)
        result = layer(x[:, part], positions=positions[:, part], mask=mask[:, part], static=static, cache=cache)
        cache, start = result.cache, start + size
        outputs.append(result.output)
    output = np.concatenate(outputs, axis=1)
    assert output.dtype == np.float32
    assert np.isfinite(output).all()
    np.testing.assert_allclose(output[mask], expected[mask], atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("positions", ["continue", "overlay"])
@pytest.mark.parametrize("live", ["causal", "self", "none"])
def test_every_mode_and_split(live, positions, split, batch, side):
    spec = make_spec(split=SPLITS[split], static=StaticSpec(live, positions))
    static = make_static(spec, batch, 7) if spec.lyra_q_heads else None
    check(spec, static, side=side)


@pytest.mark.parametrize(
    "changes",
    [
        {"softcap": 0.7},
        {"bias": True},
        {"qk_norm": None},
        {"rope": None},
        {"num_key_value_heads": 1, "split": HeadSplit((0, 3), share_kv=True)},
        {"num_key_value_heads": 6, "split": HeadSplit((1, 2, 5))},
    ],
    ids=lambda changes: next(iter(changes)) + str(next(iter(changes.values()))),
)
def test_every_option(changes):
    spec = make_spec(**({"split": SPLITS["cut"]} | changes))
    check(spec, make_static(spec, 1, 6))


@pytest.mark.parametrize("live", ["causal", "self", "none"])
@pytest.mark.parametrize("chunks", [[1] * 6, [4, 2], [1, 5]])
def test_chunks(chunks, live):
    spec = make_spec(split=SPLITS["cut"], static=StaticSpec(live))
    check(spec, make_static(spec, 2, 5), lengths=(6, 4), tokens=6, chunks=chunks)


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 5]])
@pytest.mark.parametrize("window", [1, 3, 20])
def test_sliding_window(window, chunks):
    check(make_spec(sliding_window=window), lengths=(9, 6), tokens=9, chunks=chunks)


@pytest.mark.parametrize("live", ["self", "none"])
def test_live_modes_need_no_context(live):
    check(make_spec(split=SPLITS["cut"], static=StaticSpec(live)))


def test_queries_in_blocks(monkeypatch):
    monkeypatch.setattr(partial, "SCORES_PER_TILE", 1)
    spec = make_spec(split=SPLITS["cut"])
    check(spec, make_static(spec, 1, 6))
    check(spec, make_static(spec, 2, 6))


def test_far_positions():
    spec = make_spec(split=SPLITS["last"])
    weights, static = make_weights(spec), make_static(spec, 1, 6)
    x, positions, mask = make_rows((4,), 4, "left", spec.hidden_size)
    positions = positions + 131_000
    output = TorchBackend().attention(spec, weights)(x, positions=positions, static=static).output
    np.testing.assert_allclose(output, brute_force(spec, weights, x, positions, mask, static), atol=ATOL)


def test_no_visible_key_is_exactly_zero():
    spec = make_spec(split=SPLITS["all"], static=StaticSpec("none"))
    layer = TorchBackend().attention(spec, make_weights(spec))
    x, positions, _ = make_rows((3, 3), 3, "left", spec.hidden_size)
    static = make_static(spec, 2, 4, holes=False)
    static.mask[1] = False
    output = layer(x, positions=positions, static=static).output
    assert (output[0] != 0).any()
    assert (output[1] == 0).all()
    assert (layer(x, positions=positions).output == 0).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_masked_slots_change_no_bit(batch):
    spec = make_spec(split=SPLITS["cut"])
    layer = TorchBackend().attention(spec, make_weights(spec))
    x, positions, mask = make_rows((5, 3), 5, "right", spec.hidden_size)
    static = make_static(spec, batch, 6)
    hidden = ~static.mask[:, None, :, None]
    calm = StaticLayer(np.where(hidden, 0, static.k), np.where(hidden, 0, static.v), static.mask, static.positions)
    quiet = np.where(mask[:, :, None], x, 0)
    first = layer(x, positions=positions, mask=mask, static=static).output
    second = layer(quiet, positions=positions, mask=mask, static=calm).output
    assert (first[mask] == second[mask]).all()


def test_vanilla_heads_do_not_notice_the_context():
    spec = make_spec(split=SPLITS["cut"])
    layer = TorchBackend().attention(spec, make_weights(spec))
    x, positions, _ = make_rows((5, 5), 5, "left", spec.hidden_size)
    alone = layer(x, positions=positions, trace=True).trace["heads"]
    beside = layer(x, positions=positions, static=make_static(spec, 1, 6), trace=True).trace["heads"]
    vanilla, lyra = list(spec.split.vanilla_q_heads), list(spec.lyra_q_heads)
    assert (alone[:, :, vanilla] == beside[:, :, vanilla]).all()
    assert (alone[:, :, lyra] != beside[:, :, lyra]).any()


def test_trace_names_shapes_and_bits():
    spec = make_spec(split=SPLITS["last"])
    layer = TorchBackend().attention(spec, make_weights(spec))
    x, positions, _ = make_rows((5, 5), 5, "left", spec.hidden_size)
    first = layer(x, positions=positions, static=make_static(spec, 1, 6), trace=True)
    again = layer(x, positions=positions, static=make_static(spec, 1, 6), trace=True)
    assert tuple(first.trace) == spec.trace_names()
    assert first.trace["q_rope"].shape == first.trace["heads"].shape == (2, 5, 6, 8)
    assert first.trace["k_rope"].shape == first.trace["v_proj"].shape == (2, 5, 3, 8)
    assert (first.trace["output"] == first.output).all()
    assert all((first.trace[name] == again.trace[name]).all() for name in first.trace)
    assert layer(x, positions=positions).trace == {}
    plain = make_spec(qk_norm=None, rope=None)
    trace = TorchBackend().attention(plain, make_weights(plain))(x, positions=positions, trace=True).trace
    assert tuple(trace) == plain.trace_names()


def test_cache_is_not_changed_and_can_be_reordered_and_cropped():
    spec = make_spec(split=SPLITS["last"])
    layer = TorchBackend().attention(spec, make_weights(spec))
    x, positions, mask = make_rows((6, 6), 6, "left", spec.hidden_size)
    static = make_static(spec, 1, 4)
    cache = layer(x[:, :4], positions=positions[:, :4], static=static).cache
    first = layer(x[:, 4:], positions=positions[:, 4:], static=static, cache=cache).output
    again = layer(x[:, 4:], positions=positions[:, 4:], static=static, cache=cache).output
    assert (first == again).all()
    swapped = layer(x[::-1, 4:], positions=positions[:, 4:], static=static, cache=layer.reorder(cache, [1, 0])).output
    np.testing.assert_allclose(swapped[::-1], first, atol=1e-6)
    cropped = layer.crop(cache, 2)
    whole = brute_force(spec, make_weights(spec), x, positions, mask, static)
    later = layer(x[:, 2:], positions=positions[:, 2:], static=static, cache=cropped).output
    np.testing.assert_allclose(later, whole[:, 2:], atol=ATOL)


def test_bad_inputs_are_named():
    spec = make_spec(split=SPLITS["last"])
    layer = TorchBackend().attention(spec, make_weights(spec))
    x, positions, _ = make_rows((3, 3), 3, "left", spec.hidden_size)
    cache = layer(x, positions=positions).cache
    with pytest.raises(InputError, match="cache holds 2 rows and x 1"):
        layer(x[:1], positions=positions[:1], cache=cache)
    with pytest.raises(InputError, match="weights: missing"):
        TorchBackend().attention(spec, {})


def test_says_what_it_computes_on():
    backend = get_backend("torch")
    assert isinstance(backend, PlacedBackend)
    assert backend.hardware == "CPU"


def test_found_by_name_and_imports_no_transformers():
    assert isinstance(get_backend("torch"), TorchBackend)
    code = (
        "import sys; sys.modules['jax'] = sys.modules['transformers'] = None; import lyra.backends.torch_impl as t; "
        "assert t.TorchBackend().name == 'torch'"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
