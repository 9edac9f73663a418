"""The injected block: its spec, and its oracle on numbers worked out by hand and in loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from small_layers import layer

from lyra.conformance.oracles.hf_sequential import DecoderLayerOracle
from lyra.conformance.tolerance import K, distance
from lyra.spec import HeadSplit, InputError, QKNormSpec, RopeSpec, SequentialSpec, SpecError, StaticSpec
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer, check_block_call, check_call, check_own_cache, check_weights
from lyra.spec.reference import reference
from lyra.spec.reference_sequential import block_stage_from_trace, own_keys, reference_sequential
from lyra.spec.uncertain import U

# The spec

BLOCKS = [
    SequentialSpec(layer()),
    SequentialSpec(layer(split=HeadSplit((0, 1)), qk_norm=None), gate=-0.25, residual=False, norm_eps=1e-3),
    SequentialSpec(layer(sliding_window=3), source="own", output_norm=False, gate=1.0),
]


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_survives_toml_json_and_dict(block: SequentialSpec) -> None:
    for again in (
        SequentialSpec.from_toml(block.to_toml()),
        SequentialSpec.from_json(block.to_json()),
        SequentialSpec.from_dict(block.to_dict()),
        block.replace(),
    ):
        assert again == block
        assert hash(again) == hash(block)
        assert again.attention.lyra_kv_heads == block.attention.lyra_kv_heads
    assert block.replace(gate=7.5) != block


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"source": "own", "attention": layer(split=HeadSplit((2, 3)))}, r"no head goes to Lyra, got \(2, 3\)"),
        ({"source": "other"}, "SequentialSpec.source"),
        ({"norm_eps": 0.0}, "SequentialSpec.norm_eps"),
        ({"gate": math.inf}, "SequentialSpec.gate"),
        ({"gates": 1.0}, "SequentialSpec.gates"),
        ({"attention": {"hidden_size": 8}}, "num_attention_heads"),
    ],
)
def test_what_is_no_block_is_refused_naming_the_field(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        SequentialSpec(**({"attention": layer()} | fields))


def test_a_block_starts_as_no_change() -> None:
    block = SequentialSpec(layer())
    assert (block.gate, block.residual, block.source, block.output_norm) == (0.0, True, "external", True)


def test_the_default_block_of_a_layer_reads_its_context_only() -> None:
    own_layer = layer(qk_norm=QKNormSpec(eps=1e-4), split=HeadSplit((0, 1)), bias=True)
    block = SequentialSpec.for_layer(own_layer, gate=0.5)
    assert block.attention.split == HeadSplit.all(own_layer)
    assert block.attention.static == StaticSpec(live="none")
    assert (block.norm_eps, block.gate, block.attention.bias) == (1e-4, 0.5, True)
    assert SequentialSpec.for_layer(own_layer, norm_eps=1e-3).norm_eps == 1e-3
    sharing = SequentialSpec.for_layer(own_layer, source="own")
    assert (sharing.source, sharing.attention) == ("own", own_layer.replace(split=None))
    with pytest.raises(SpecError, match="put the split on a global layer"):
        SequentialSpec.for_layer(layer(sliding_window=4))


def test_weights_and_stages() -> None:
    inner = layer(rope=None)
    block = SequentialSpec(inner)
    assert block.weight_shapes() == {
        "input_norm.weight": (24,),
        "output_norm.weight": (24,),
        **inner.weight_shapes(),
    }
    assert set(SequentialSpec(inner, output_norm=False).weight_shapes()) == set(block.weight_shapes()) - {
        "output_norm.weight"
    }
    assert SequentialSpec(inner, source="own").weight_shapes() == block.weight_shapes()
    stages = ("input_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm", "heads")
    assert block.trace_names() == (*stages, "attention", "output_norm", "output")
    assert SequentialSpec(layer(), source="own", output_norm=False).trace_names() == (
        "input_norm", "q_proj", "q_norm", "q_rope", "heads", "attention", "output",
    )  # fmt: skip


def test_a_block_takes_its_weights_from_its_layer() -> None:
    block = SequentialSpec(layer(), output_norm=True)
    rng = np.random.default_rng(0)
    theirs = {
        "input_layernorm.weight": "input_norm.weight",
        "post_attention_layernorm.weight": "output_norm.weight",
        **{f"self_attn.{name}": name for name in layer().weight_shapes()},
    }
    state = {name: rng.normal(size=block.weight_shapes()[ours]) for name, ours in theirs.items()}
    state["mlp.up_proj.weight"] = rng.normal(size=(2, 24))
    weights = block.weights_of(state)
    assert {name: id(array) for name, array in weights.items()} == {theirs[n]: id(state[n]) for n in theirs}
    assert set(check_weights(block, weights)) == set(weights)
    del state["post_attention_layernorm.weight"]
    assert "output_norm.weight" not in block.replace(output_norm=False).weights_of(state)
    with pytest.raises(InputError, match=r"lack \['post_attention_layernorm.weight'\]"):
        block.weights_of(state)


# Calls

X = np.zeros((2, 3, 24), np.float32)
AT = np.array([[0, 1, 2], [0, 0, 1]])
REAL = np.array([[True, True, True], [False, True, True]])


def test_a_block_that_shares_a_cache_needs_one_and_takes_no_context() -> None:
    block = SequentialSpec(layer(), source="own")
    static = StaticLayer(*np.zeros((2, 1, 0, 3, 6), np.float32), np.ones((1, 3), bool), np.zeros((1, 3), int))
    with pytest.raises(InputError, match="no context, but a static layer was given"):
        check_block_call(block, X, AT, REAL, static, object())
    with pytest.raises(InputError, match="needs the cache"):
        check_block_call(block, X, AT, REAL, None, None)
    assert check_block_call(block, X, AT, REAL, None, object()).x.shape == X.shape
    assert check_block_call(block.replace(source="external"), X, AT, REAL, None, None).static is None


def test_a_shared_cache_ends_with_the_tokens_of_the_call() -> None:
    spec, inputs = layer(), check_call(layer(), X, AT, REAL, None)
    heads = (4, 6)
    check_own_cache(spec, inputs, heads, REAL, AT)
    check_own_cache(spec, inputs, heads, REAL, AT * REAL + 7 * ~REAL)  # where padding sits is nobody's business
    longer = np.ones((2, 2), bool), np.array([[8, 9], [8, 9]])
    check_own_cache(
        spec, inputs, heads, *(np.concatenate(pair, axis=1) for pair in zip(longer, (REAL, AT), strict=True))
    )
    for wrong in (
        (REAL[:, :2], AT[:, :2]),
        (REAL, AT + 1),
        (~REAL, AT),
        tuple(np.concatenate(pair, axis=1) for pair in zip((REAL, AT), longer, strict=True)),
    ):
        with pytest.raises(InputError, match="does not end with the 3 tokens of this call"):
            check_own_cache(spec, inputs, heads, *wrong)
    with pytest.raises(InputError, match="the cache has 1 rows, x has 2"):
        check_own_cache(spec, inputs, heads, REAL[:1], AT[:1])
    with pytest.raises(InputError, match="holds 2 KV heads of 6; the block reads 4 of 6"):
        check_own_cache(spec, inputs, (2, 6), REAL, AT)


# The oracle

TINY = AttentionSpec(2, 1, 1, 2, 1.0, qk_norm=None, rope=None, split=HeadSplit((0,)), static=StaticSpec(live="none"))


def tiny_weights() -> dict[str, np.ndarray]:
    return {
        "input_norm.weight": np.array([1.0, 0.0], np.float32),
        "output_norm.weight": np.array([0.0, 2.0], np.float32),
        **{f"{kind}_proj.weight": np.eye(2, dtype=np.float32) for kind in "qkv"},
        "o_proj.weight": np.array([[1.0, 2.0], [0.0, 1.0]], np.float32),
    }


def one_key(v: tuple[float, float]) -> StaticLayer:
    value = np.array(v, np.float32).reshape(1, 1, 1, 2)
    return StaticLayer(np.ones_like(value), value, np.ones((1, 1), bool), np.zeros((1, 1), int))


def test_one_token_and_one_key_by_hand() -> None:
    """v = (1, 1) is what the head gives, o_proj makes (3, 1) of it, the norm (3, 3) / √5, the gate half of that."""
    block = SequentialSpec(TINY, gate=0.5, norm_eps=1e-30)
    h = np.array([[[3.0, 4.0]]], np.float32)
    stages = reference_sequential(block, tiny_weights(), h, positions=np.array([[0]]), static=one_key((1.0, 1.0)))
    assert tuple(stages) == block.trace_names()
    for name, wanted in {
        "input_norm": (6 / math.sqrt(12.5), 4 / math.sqrt(12.5)),
        "attention": (3, 1),
        "output_norm": (3 / math.sqrt(5), 3 / math.sqrt(5)),
        "output": (3 + 1.5 / math.sqrt(5), 4 + 1.5 / math.sqrt(5)),
    }.items():
        np.testing.assert_allclose(stages[name].value[0, 0], wanted, rtol=1e-14)
    without = {
        "residual": (block.replace(residual=False), np.array([1.5, 1.5]) / math.sqrt(5)),
        "output_norm": (block.replace(output_norm=False), np.array([4.5, 4.5])),
        "gate": (block.replace(gate=0.0), np.array([3.0, 4.0])),
    }
    for other, wanted in without.values():
        weights = {name: tiny_weights()[name] for name in other.weight_shapes()}
        got = reference_sequential(other, weights, h, positions=np.array([[0]]), static=one_key((1.0, 1.0)))
        np.testing.assert_allclose(got["output"].value[0, 0], wanted, rtol=1e-14)


def test_eps_stands_inside_the_root_of_both_norms() -> None:
    block = SequentialSpec(TINY, gate=1.0, residual=False, norm_eps=2.0)
    h = np.array([[[1.0, 1.0]]], np.float32)
    stages = reference_sequential(block, tiny_weights(), h, positions=np.array([[0]]), static=one_key((1.0, 1.0)))
    np.testing.assert_allclose(stages["input_norm"].value[0, 0], (2 / math.sqrt(3), 1 / math.sqrt(3)), rtol=1e-14)
    np.testing.assert_allclose(stages["output"].value[0, 0], (3 / math.sqrt(7), 3 / math.sqrt(7)), rtol=1e-14)


def test_own_keys_by_hand() -> None:
    """With queries of 0 a head averages the values up to its own token: those of the layer, not of the block."""
    spec = TINY.replace(split=None)
    block = SequentialSpec(spec, source="own", gate=1.0, output_norm=False)
    weights = {name: tiny_weights()[name] for name in block.weight_shapes()}
    weights |= {"q_proj.weight": np.zeros((2, 2), np.float32), "o_proj.weight": np.eye(2, dtype=np.float32)}
    x = np.array([[[1.0, 0.0], [9.0, 9.0], [0.0, 2.0]]], np.float32)
    real, at = np.array([[True, False, True]]), np.array([[0, 0, 1]])
    theirs = {f"{kind}_proj.weight": np.diag([1.0, 10.0]).astype(np.float32) for kind in "qkvo"}
    own = own_keys(spec, theirs, x, positions=at)
    h = np.array([[[5.0, 5.0], [7.0, 7.0], [6.0, 8.0]]], np.float32)
    got = reference_sequential(block, weights, h, positions=at, mask=real, own=own)
    np.testing.assert_allclose(got["output"].value[0, [0, 2]], [[6.0, 5.0], [6.5, 18.0]], rtol=1e-14)


def test_own_keys_are_those_of_the_layers_oracle() -> None:
    spec = layer(hidden_size=8)
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in spec.weight_shapes().items()}
    x, at = rng.normal(size=(2, 3, 8)).astype(np.float32), np.array([[4, 5, 6], [0, 1, 2]])
    stages, own = reference(spec, weights, x, positions=at), own_keys(spec, weights, x, positions=at)
    for got, wanted in ((own.k, stages["k_rope"]), (own.v, stages["v_proj"])):
        assert np.array_equal(got.value, wanted.value)
        assert np.array_equal(got.variance, wanted.variance)


def a_block(**changes: Any) -> tuple[SequentialSpec, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    block = SequentialSpec(**({"attention": layer(), "gate": 0.75} | changes))
    rng = np.random.default_rng(2)
    weights = {name: 0.3 * rng.normal(size=s).astype(np.float32) for name, s in block.weight_shapes().items()}
    return block, weights, rng.normal(size=(2, 3, 24)).astype(np.float32), np.array([[0, 1, 2], [5, 6, 7]])


def test_sigma_of_the_join() -> None:
    """h is exact where nothing is added; else the gate carries σ of y, and product, gate and sum round once each."""
    block, weights, h, at = a_block()
    stages = reference_sequential(block, weights, h, positions=at)
    y, change = stages["output_norm"], 0.75 * stages["output_norm"].value
    rounding = (2 * U * change) ** 2 + (U * (h + change)) ** 2
    np.testing.assert_allclose(stages["output"].variance, 0.75**2 * y.variance + rounding, rtol=1e-12)
    closed = reference_sequential(block.replace(gate=0.0), weights, h, positions=at)["output"]
    assert np.array_equal(closed.value, h)
    assert not closed.variance.any()
    alone = reference_sequential(block.replace(residual=False), weights, h, positions=at)["output"]
    np.testing.assert_allclose(alone.variance, 0.75**2 * y.variance + (2 * U * change) ** 2, rtol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"output_norm": False}, {"source": "own"}, {"residual": False}])
def test_a_stage_follows_from_the_one_before(changes: dict[str, Any]) -> None:
    """Every stage on the exact stages before it is the oracle's own, with a smaller σ; one that is off is noticed."""
    block, weights, h, at = a_block(**changes)
    own = own_keys(block.attention, {n: weights[n] for n in layer().weight_shapes()}, h[::-1], positions=at)
    own_or_none = own if block.source == "own" else None
    whole = reference_sequential(block, weights, h, positions=at, own=own_or_none)
    assert tuple(whole) == block.trace_names()
    trace = {name: stage.value.astype(np.float32) for name, stage in whole.items()}
    for name, stage in whole.items():
        alone = block_stage_from_trace(block, weights, name, trace, h, positions=at, own=own_or_none)
        assert distance(trace[name], alone).ratio < K
        assert (alone.variance <= stage.variance * (1 + 1e-3)).all()
        off = trace[name] * np.float32(1 + 2.0**-12)
        assert distance(off, alone).ratio > 2 * K, name
    with pytest.raises(KeyError, match="unknown stage"):
        block_stage_from_trace(block, weights, "nothing", trace, h, positions=at, own=own_or_none)


# Hugging Face's decoder layer

STRUCTURES = [{}, {"bias": True}, {"sliding_window": 2}, {"scale": 168**-0.5, "rope": RopeSpec(1e4, 8.0)}]


@pytest.mark.parametrize("changes", STRUCTURES)
def test_a_decoder_layer_is_its_two_halves(changes: dict[str, Any]) -> None:
    """The place where a block stands is right: the halves give the bits of the whole, and neither does by itself."""
    block, weights, x, at = a_block(attention=layer(**changes))
    theirs = DecoderLayerOracle(block.attention, weights, at, np.ones(at.shape, bool), seed=3)
    h = theirs.attention_half(x)
    assert np.array_equal(theirs.feed_forward_half(h), theirs.whole(x))
    assert np.abs(theirs.whole(x) - h).max() > 0.1
    assert np.abs(h - x).max() > 0.1
    taken = block.weights_of(theirs.weights)
    assert all(np.array_equal(taken[name], weights[name]) for name in block.weight_shapes())


def test_the_attention_half_is_the_block_at_gate_one() -> None:
    block, weights, x, at = a_block(gate=1.0)
    mask = np.array([[False, True, True], [True, True, True]])
    at = np.array([[0, 0, 1], [5, 6, 7]])
    theirs = DecoderLayerOracle(block.attention, weights, at, mask).attention_half(x)
    ours = reference_sequential(block, weights, x, positions=at, mask=mask)["output"]
    assert distance(theirs, ours, mask).ratio < K
    unlike = DecoderLayerOracle(block.attention, weights, at, mask | True).attention_half(x)
    assert distance(unlike, ours, mask).ratio > K
