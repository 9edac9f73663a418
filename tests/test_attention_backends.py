"""Both backends at the attention level, against a literal float64 brute force written here."""

from __future__ import annotations

import importlib
import subprocess
import sys
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import numpy as np
import pytest

from lyra.backends.protocol import Attention, Backend, PlacedBackend, StaticLayer, get_backend
from lyra.spec import AttentionSpec, HeadSplit, InputError, QKNormSpec, RopeSpec, StaticSpec

E, HQ, HKV, D = 24, 6, 3, 8
POISON = np.float32(1e30)
SPLITS = {
    "none": HeadSplit.none(),
    "last": HeadSplit((4, 5)),
    "apart": HeadSplit((0, 1, 4, 5)),
    "cut": HeadSplit((0, 3, 5), share_kv=True),
    "scattered": HeadSplit((0, 5), share_kv=True),
    "all": HeadSplit(tuple(range(HQ))),
}
CUTS = {"one call": (), "chunks": (1, 4), "token by token": (1, 2, 3, 4, 5)}
FAR = {"torch": 1e-5, "jax": 3e-3}
"""How far a layer may be off at position 131,000: JAX has the angles in float32."""


class Case(NamedTuple):
    """Arguments of a call."""

    x: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    static: StaticLayer | None

    def part(self, start: int, stop: int | None = None) -> dict[str, Any]:
        """The arguments of a call with some of the tokens only."""
        cut = slice(start, stop)
        return {"positions": self.positions[:, cut], "mask": self.mask[:, cut], "static": self.static}


def make_spec(**changes: Any) -> AttentionSpec:
    sizes = {"hidden_size": E, "num_attention_heads": HQ, "num_key_value_heads": HKV, "head_dim": D}
    numbers = {"scale": 0.3, "qk_norm": QKNormSpec(1e-6), "rope": RopeSpec(10_000.0, 2.0)}
    return AttentionSpec(**(sizes | numbers | changes))


def make_weights(spec: AttentionSpec, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * (0.3 if len(shape) == 2 else 0.5)).astype(np.float32)
        for name, shape in spec.weight_shapes().items()
    }


def make_static(spec: AttentionSpec, rows: int, slots: int, *, holes: bool = True, seed: int = 1) -> StaticLayer:
    """A random context; hidden slots hold poison and stand far away."""
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, rows, len(spec.lyra_kv_heads), slots, spec.head_dim)).astype(np.float32)
    mask = rng.random((rows, slots)) < 0.6 if holes else np.ones((rows, slots), dtype=bool)
    positions = np.cumsum(rng.integers(1, 4, (rows, slots)), axis=1)
    hidden = np.broadcast_to(~mask[:, None], k.shape[:3])
    k[hidden], v[hidden] = POISON, -POISON
    return StaticLayer(k, v, mask, np.where(mask, positions, 10**6))


def make_case(spec: AttentionSpec, tokens: int = 6, padding: str = "none", static_rows: int = 1, seed: int = 2) -> Case:
    """Two rows, the second of which is shorter by two tokens where there is padding, which holds poison."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, tokens, spec.hidden_size)).astype(np.float32)
    mask = np.ones((2, tokens), bool)
    mask[1, {"none": slice(0), "left": slice(2), "right": slice(-2, None)}[padding]] = False
    x[~mask] = POISON
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    static = make_static(spec, static_rows, 7) if spec.lyra_q_heads and static_rows else None
    return Case(x, positions, mask, static)


def turn(vector: np.ndarray, position: float, rope: RopeSpec | None) -> np.ndarray:
    if rope is None:
        return vector
    half = len(vector) // 2
    angle = position * rope.theta ** (-2 * np.arange(half) / len(vector)) / rope.factor
    a, b = vector[:half], vector[half:]
    return np.concatenate((a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)))


def brute_force(spec: AttentionSpec, weights: dict[str, np.ndarray], case: Case) -> np.ndarray:
    """The clauses read literally, in float64, one query and one head at a time; [B,T,E], NaN at padding."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    result = np.full(case.x.shape, np.nan)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0.0)

    @cache
    def head(row: int, t: int, name: str, index: int) -> np.ndarray:
        x = case.x[row, t].astype(np.float64)
        y = linear(x, f"{name}_proj")[index * spec.head_dim : (index + 1) * spec.head_dim]
        if spec.qk_norm is None or name == "v":
            return y
        return y / np.sqrt(np.mean(y**2) + spec.qk_norm.eps) * (1 + w[f"{name}_norm.weight"])

    for row in range(len(case.x)):
        real, at = np.flatnonzero(case.mask[row]), case.positions[row]
        for t in real:
            heads = []
            for h in range(spec.num_attention_heads):
                kv, lyra, shift, keys, values = h // spec.group_size, h in spec.lyra_q_heads, 0, [], []
                if lyra and case.static is not None:
                    context = min(row, len(case.static.k) - 1)
                    seen, axis = np.flatnonzero(case.static.mask[context]), spec.lyra_kv_heads.index(kv)
                    places = case.static.positions[context]
                    shift = max(places[seen], default=-1) + 1 if spec.static.positions == "continue" else 0
                    keys += [turn(case.static.k[context, axis, j].astype(float), places[j], spec.rope) for j in seen]
                    values += [case.static.v[context, axis, j].astype(float) for j in seen]
                mode = spec.static.live if lyra else "causal"
                for s in real:
                    inside = spec.sliding_window is None or at[s] > at[t] - spec.sliding_window
                    if at[s] <= at[t] and inside and (mode == "causal" or (mode == "self" and s == t)):
                        keys.append(turn(head(row, s, "k", kv), at[s] + shift, spec.rope))
                        values.append(head(row, s, "v", kv))
                if not keys:
                    heads.append(np.zeros(spec.head_dim))
                    continue
                scores = np.array(keys) @ turn(head(row, t, "q", h), at[t] + shift, spec.rope) * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * np.tanh(scores / spec.softcap)
                p = np.exp(scores - scores.max())
                heads.append(p @ np.array(values) / p.sum())
            result[row, t] = linear(np.concatenate(heads), "o_proj")
    return result


def layer_of(backend: str, spec: AttentionSpec) -> Attention:
    return get_backend(backend).attention(spec, make_weights(spec))


def run(layer: Attention, case: Case, cuts: tuple[int, ...] = ()) -> np.ndarray:
    """The layer over the case's tokens, in one call or cut at `cuts`."""
    outputs, cache = [], None
    for start, stop in pairwise((0, *cuts, case.x.shape[1])):
        result = layer(case.x[:, start:stop], **case.part(start, stop), cache=cache)
        outputs.append(result.output)
        cache = result.cache
    return np.concatenate(outputs, axis=1)


@cache
def expected_of(spec: AttentionSpec, **sizes: Any) -> np.ndarray:
    """The brute force of a case: once for both backends and every way to cut it."""
    return brute_force(spec, make_weights(spec), make_case(spec, **sizes))


def check(backend: str, spec: AttentionSpec, cuts: tuple[int, ...] = (), **sizes: Any) -> None:
    """The backend's layer over a case of `make_case`, in one call or cut at `cuts`, against the brute force."""
    expected, case = expected_of(spec, **sizes), make_case(spec, **sizes)
    output = run(layer_of(backend, spec), case, cuts)
    assert output.dtype == np.float32
    assert np.isfinite(output).all()
    bound = 2e-6 * np.abs(expected[case.mask]).max()
    np.testing.assert_allclose(output[case.mask], expected[case.mask], rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("padding", "static_rows", "cuts"),
    [
        ("left", 1, "one call"), ("right", 1, "token by token"), ("left", 2, "chunks"), ("right", 2, "one call"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("positions", ["continue", "overlay"])
@pytest.mark.parametrize("live", ["causal", "self", "none"])
def test_every_mode_split_and_cut(
    backend: str, live: Any, positions: Any, split: str, padding: str, static_rows: int, cuts: str
) -> None:
    spec = make_spec(split=SPLITS[split], static=StaticSpec(live=live, positions=positions))
    check(backend, spec, CUTS[cuts], padding=padding, static_rows=static_rows)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize(("padding", "static_rows"), list(product(["none", "left", "right"], [0, 1, 2])))
def test_padding_and_rows_of_a_context(backend: str, padding: str, static_rows: int, cuts: tuple[int, ...]) -> None:
    spec = make_spec(split=SPLITS["cut"])
    check(backend, spec, cuts, padding=padding, static_rows=static_rows)


VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 3, "split": None},
    "window of one": {"sliding_window": 1, "split": None},
    "wide window": {"sliding_window": 20, "split": None},
    "softcap": {"softcap": 0.7},
    "bias": {"bias": True},
    "no norm": {"qk_norm": None},
    "no rope": {"rope": None},
    "neither": {"qk_norm": None, "rope": None, "split": SPLITS["all"]},
    "large eps": {"qk_norm": QKNormSpec(eps=0.3)},
    "multi query": {"num_key_value_heads": 1, "split": HeadSplit((0, 3), share_kv=True)},
    "multi head": {"num_key_value_heads": 6, "split": HeadSplit((1, 2, 5))},
}


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_every_option(backend: str, changes: dict[str, Any], cuts: tuple[int, ...]) -> None:
    spec = make_spec(**({"split": SPLITS["cut"]} | changes))
    check(backend, spec, cuts, padding="left")


@pytest.mark.parametrize("live", ["self", "none"])
def test_live_modes_need_no_context(backend: str, live: Any) -> None:
    spec = make_spec(split=SPLITS["cut"], static=StaticSpec(live=live))
    for cuts in ((), (2, 3)):
        check(backend, spec, cuts, padding="left", static_rows=0)


def test_a_cache_outgrows_its_room(backend: str) -> None:
    spec = make_spec(split=SPLITS["cut"])
    check(backend, spec, (15, 17, 18), tokens=21, padding="left")


def test_queries_in_tiles(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing changes where every query is a tile of its own."""
    partial = importlib.import_module(f"lyra.backends.{backend}_impl.partial")
    constant = "SCORES_PER_TILE" if hasattr(partial, "SCORES_PER_TILE") else "SCORES_PER_BLOCK"
    monkeypatch.setattr(partial, constant, 1)
    spec = make_spec(split=SPLITS["cut"])
    for static_rows in (1, 2):
        check(backend, spec, tokens=9, padding="left", static_rows=static_rows)


@pytest.mark.parametrize("rope", [RopeSpec(10_000.0, 2.0), RopeSpec(1e6, 8.0)], ids=["local", "global"])
def test_far_positions(backend: str, rope: RopeSpec) -> None:
    spec = make_spec(split=SPLITS["last"], rope=rope)
    case = make_case(spec)
    far = case._replace(positions=case.positions + 131_000)
    expected = brute_force(spec, make_weights(spec), far)
    bound = FAR[backend] * np.abs(expected).max()
    np.testing.assert_allclose(run(layer_of(backend, spec), far), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("static_rows", [1, 2])
def test_masked_slots_change_no_bit(backend: str, static_rows: int) -> None:
    spec = make_spec(split=SPLITS["cut"])
    layer = layer_of(backend, spec)
    for padding, cuts in (("right", ()), ("left", (3,))):
        case = make_case(spec, padding=padding, static_rows=static_rows)
        assert case.static is not None
        hidden = ~np.broadcast_to(case.static.mask[:, None], case.static.k.shape[:3])
        k, v, x = case.static.k.copy(), case.static.v.copy(), case.x.copy()
        k[hidden], v[hidden], x[~case.mask] = 0.5, 3.0, -7.0
        clean = case._replace(x=x, static=case.static._replace(k=k, v=v))
        np.testing.assert_array_equal(run(layer, clean, cuts)[case.mask], run(layer, case, cuts)[case.mask])


def test_arrays_may_run_backwards_in_memory(backend: str) -> None:
    """Views that run backwards, as x[:, ::-1] is one, give what their copies give."""
    spec = make_spec(split=SPLITS["cut"])
    weights, case = make_weights(spec), make_case(spec, padding="left", static_rows=2)
    assert case.static is not None

    def backwards(array: np.ndarray) -> np.ndarray:
        return np.flip(np.ascontiguousarray(np.flip(array)))

    views = Case(*map(backwards, case[:3]), StaticLayer(*map(backwards, case.static)))
    layer = get_backend(backend).attention(spec, {name: backwards(value) for name, value in weights.items()})
    np.testing.assert_array_equal(run(layer, views)[case.mask], run(layer_of(backend, spec), case)[case.mask])


def test_later_tokens_have_no_influence(backend: str) -> None:
    spec = make_spec(split=SPLITS["cut"])
    layer, case = layer_of(backend, spec), make_case(spec)
    poisoned = case._replace(x=np.concatenate([case.x[:, :4], np.full_like(case.x[:, 4:], POISON)], axis=1))
    np.testing.assert_array_equal(run(layer, poisoned)[:, :4], run(layer, case)[:, :4])


def test_vanilla_heads_do_not_notice_the_context(backend: str) -> None:
    spec = make_spec(split=SPLITS["cut"])
    layer, case = layer_of(backend, spec), make_case(spec)
    alone = layer(case.x, positions=case.positions, trace=True).trace["heads"]
    beside = layer(case.x, positions=case.positions, static=case.static, trace=True).trace["heads"]
    vanilla, lyra = list(spec.split.vanilla_q_heads), list(spec.lyra_q_heads)
    np.testing.assert_array_equal(alone[:, :, vanilla], beside[:, :, vanilla])
    assert (alone[:, :, lyra] != beside[:, :, lyra]).any()


@pytest.mark.parametrize("context", ["absent", "empty", "hidden", "hidden from one row"])
def test_a_head_that_sees_nothing_gives_exactly_zero(backend: str, context: str) -> None:
    spec = make_spec(split=SPLITS["last"], static=StaticSpec(live="none"))
    hidden = {"hidden": np.zeros((1, 4), bool), "hidden from one row": np.repeat([[True], [False]], 4, axis=1)}
    static = None if context == "absent" else make_static(spec, 1, 0 if context == "empty" else 4, holes=False)
    if context in hidden:
        wide = make_static(spec, len(hidden[context]), 4, holes=False)
        poison = np.broadcast_to(~hidden[context][:, None, :, None], wide.v.shape)
        static = wide._replace(mask=hidden[context], v=np.where(poison, POISON, wide.v))
    case = make_case(spec, static_rows=0)
    heads = layer_of(backend, spec)(case.x, positions=case.positions, static=static, trace=True).trace["heads"]
    blind = heads[1:] if context == "hidden from one row" else heads
    np.testing.assert_array_equal(blind[:, :, 4:], 0.0)
    assert np.abs(heads[:, :, :4]).min() > 0
    assert (np.abs(heads[0, :, 4:]).min() > 0) == (context == "hidden from one row")


@pytest.mark.parametrize("changes", [{}, {"qk_norm": None}, {"rope": None}, {"qk_norm": None, "rope": None}])
def test_trace_names_shapes_and_bits(backend: str, changes: dict[str, Any]) -> None:
    spec = make_spec(split=SPLITS["cut"], **changes)
    layer, case = layer_of(backend, spec), make_case(spec)
    first, again = (layer(case.x, **case.part(0), trace=True) for _ in range(2))
    assert tuple(first.trace) == spec.trace_names()
    for name, value in first.trace.items():
        heads = HQ if name[0] in "qh" else HKV
        assert value.shape == ((2, 6, E) if name == "output" else (2, 6, heads, D)), name
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, again.trace[name])
    np.testing.assert_array_equal(first.trace["output"], first.output)
    assert layer(case.x, **case.part(0)).trace == {}


def test_the_given_cache_is_unchanged(backend: str) -> None:
    spec = make_spec(split=SPLITS["cut"])
    layer, case = layer_of(backend, spec), make_case(spec, padding="left")
    cache = layer(case.x[:, :4], **case.part(0, 4)).cache
    first = layer(case.x[:, 4:], **case.part(4), cache=cache).output
    layer(case.x[:, 4:] * 100, **case.part(4), cache=cache)
    np.testing.assert_array_equal(layer(case.x[:, 4:], **case.part(4), cache=cache).output, first)


def test_reorder_and_crop(backend: str) -> None:
    """A cropped cache goes on as a shorter one did; rows may be put in another order, and one taken twice."""
    spec = make_spec(split=SPLITS["cut"])
    layer, case = layer_of(backend, spec), make_case(spec, tokens=7, padding="left")
    five, rows = layer(case.x[:, :5], **case.part(0, 5)).cache, [1, 0, 1]
    whole = brute_force(spec, make_weights(spec), case)[:, 3:5]
    cropped = layer(case.x[:, 3:5], **case.part(3, 5), cache=layer.crop(five, 3)).output
    np.testing.assert_allclose(cropped, whole, rtol=0, atol=5e-6)
    mixed = Case(case.x[rows], case.positions[rows], case.mask[rows], case.static)
    chosen = layer.crop(layer.reorder(five, rows), 3)
    reordered = layer(mixed.x[:, 3:5], **mixed.part(3, 5), cache=chosen).output
    np.testing.assert_allclose(reordered, whole[rows], rtol=0, atol=5e-6)


def test_bad_inputs_are_named(backend: str) -> None:
    spec = make_spec(split=SPLITS["cut"])
    layer, case = layer_of(backend, spec), make_case(spec)
    cache = layer(case.x, positions=case.positions).cache
    with pytest.raises(InputError, match=r"cache (holds|has) 2 rows(,| and) x (has )?1"):
        layer(case.x[:1], positions=case.positions[:1], cache=cache)
    with pytest.raises(InputError, match="missing"):
        get_backend(backend).attention(spec, {})


def test_a_backend_is_found_by_name_and_says_what_it_computes_on(backend: str) -> None:
    found, spec = get_backend(backend), make_spec()
    assert isinstance(found, Backend)
    assert isinstance(found, PlacedBackend)
    assert found.name == backend
    assert isinstance(found.attention(spec, make_weights(spec)), Attention)
    hardware = "CPU"
    if backend == "jax":
        import jax

        hardware = "CPU" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind
    assert found.hardware == hardware


@pytest.mark.parametrize(
    ("own", "others"),
    [
        ("torch", ("jax", "transformers")),
        ("jax", ("torch", "transformers", "accelerate", "flax")),
    ],
)
def test_a_backend_runs_without_the_other_framework(own: str, others: tuple[str, ...]) -> None:
    """Nor is what serves whole models loaded (transformers, flax), nor the oracle."""
    code = f"""
import sys
for name in {others}:
    sys.modules[name] = None
import numpy as np
from lyra.backends.protocol import get_backend
from lyra.spec import AttentionSpec
spec = AttentionSpec(4, 2, 1, 4, 0.5)
weights = {{name: np.ones(shape, np.float32) for name, shape in spec.weight_shapes().items()}}
result = get_backend({own!r}).attention(spec, weights)(np.ones((1, 2, 4), np.float32), positions=np.array([[0, 1]]))
assert result.output.shape == (1, 2, 4)
foreign = "lyra.backends.{"jax" if own == "torch" else "torch"}_impl"
assert "lyra.spec.reference" not in sys.modules and foreign not in sys.modules
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
