"""Injected blocks in Hugging Face's decoder layers: against the oracle, in calls of any size, in its own generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_blocks import VARIANTS, block_spec, blocks_in, context_of, seen_by
from torch_gemma import GLOBAL, WINDOW, greedy_by_prefill, left_padded, some_ids, token_by_token
from transformers import DynamicCache, Gemma3ForCausalLM, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from lyra.backends.torch_impl import TorchBackend
from lyra.backends.torch_impl.block_cache import WatchedCache
from lyra.backends.torch_impl.injected import (
    InjectedAttentionBlock,
    MemoryInjectionBlock,
    check_place,
    inject,
    withdraw,
)
from lyra.backends.torch_impl.sequential import join
from lyra.conformance.tolerance import K, distance
from lyra.spec import HeadSplit, InputError
from lyra.spec.reference_sequential import own_keys, reference_sequential

pytestmark = pytest.mark.usefixtures("one_thread")

SLIDING = 3


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "replacement"])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_closed_gate_is_hugging_face_bit_for_bit(torch_engine, torch_folder, name, trainable):
    rows, mask = left_padded([some_ids(1, 21)[0], some_ids(1, 16, 1)[0]])
    plain = Gemma3ForCausalLM.from_pretrained(torch_folder, attn_implementation="sdpa").eval()
    places = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.inference_mode():
        expected = plain(
            input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask.astype(int)), position_ids=places
        )
    with blocks_in(torch_engine, trainable=trainable, **VARIANTS[name] | {"gate": 0.0}):
        assert (torch_engine.logits(rows, mask) == expected.logits.numpy()).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_block_in_a_layer_equals_the_oracle(torch_engine, name):
    """What the block makes of the residual stream is within K·σ, the layer's own keys being those that it wrote."""
    layer = GLOBAL[1]
    ids, mask = left_padded([some_ids(1, 13)[0], some_ids(1, 8, 1)[0]])
    with blocks_in(torch_engine, [layer], **VARIANTS[name]) as blocks:
        assert_oracle(torch_engine, layer, blocks[layer].spec, ids, mask)


def test_a_block_stands_between_the_halves_of_its_layer(torch_engine):
    """It is given the residual stream behind self-attention, and the feed-forward half sees what it gives, no more."""
    layer, ids = GLOBAL[0], some_ids(2, 9)
    decoder = torch_engine.module.model.layers[layer]
    with blocks_in(torch_engine, residual=False) as blocks:
        run = lambda: torch_engine.logits(ids)  # noqa: E731
        (x, y), (h, given), (_, attended) = (seen_by(one, run) for one in (decoder, blocks[layer], decoder.self_attn))
    with torch.inference_mode():
        stream, middle = torch.tensor(x), torch.tensor(given)
        assert (h == (stream + decoder.post_attention_layernorm(torch.tensor(attended))).numpy()).all()
        fed = decoder.mlp(decoder.pre_feedforward_layernorm(middle))
        assert (y == (middle + decoder.post_feedforward_layernorm(fed)).numpy()).all()


def test_a_sliding_layer_lends_the_keys_in_its_window(torch_engine):
    """Phase one serves every layer: the block of a sliding one sees what the layer sees, and nothing that left."""
    ids = some_ids(1, 2 * WINDOW + 3)
    with blocks_in(torch_engine, [SLIDING], source="own") as blocks:
        assert blocks[SLIDING].spec.attention.sliding_window == WINDOW
        assert_oracle(torch_engine, SLIDING, blocks[SLIDING].spec, ids, np.ones(ids.shape, bool))
        expected = torch_engine.logits(ids)
        for size in (1, 5):
            np.testing.assert_allclose(in_calls(torch_engine, ids, size), expected, atol=1e-5 * np.abs(expected).max())


def assert_oracle(engine, layer: int, spec, ids: np.ndarray, mask: np.ndarray) -> None:
    decoder, positions = engine.module.model.layers[layer], np.maximum(mask.cumsum(1) - 1, 0)
    state = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}
    run = lambda: engine.logits(ids, mask)  # noqa: E731
    h, got = seen_by(decoder.injected, run)
    own = None
    if spec.source == "own":
        x, _ = seen_by(decoder.self_attn, run)
        own = own_keys(spec.attention, engine.attention_weights(layer), x, positions=positions)
    static = context_of_plain(engine, layer, spec)
    weights = spec.weights_of(state)
    wanted = reference_sequential(spec, weights, h, positions=positions, mask=mask, static=static, own=own)
    assert distance(got, wanted["output"], mask).ratio < K
    assert np.abs(got - h)[mask].max() > 0.1


def context_of_plain(engine, layer, spec):
    """The context that `blocks_in` attached: it is captured by the model without blocks."""
    decoder = engine.module.model.layers[layer]
    block = decoder.injected
    withdraw(decoder)
    try:
        return context_of(engine, spec, layer)
    finally:
        inject(decoder, block)


def in_calls(engine, ids: np.ndarray, size: int) -> np.ndarray:
    """Logits of a run that feeds `size` tokens a call."""
    cache = DynamicCache(config=engine.module.config)
    with torch.inference_mode():
        parts = [
            engine.module(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in torch.tensor(ids).split(size, dim=1)
        ]
    return torch.cat(parts, dim=1).numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_one_call_is_several_is_one_for_each_token(torch_engine, name):
    ids = some_ids(2, 14)
    plain = torch_engine.logits(ids)
    with blocks_in(torch_engine, **VARIANTS[name]):
        expected = torch_engine.logits(ids)
        assert np.abs(expected - plain).max() > 0.1 * np.abs(plain).max()
        for got in (in_calls(torch_engine, ids, 5), token_by_token(torch_engine, ids)):
            np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["none", "causal", "own"])
def test_hugging_faces_own_generation_works_with_blocks(torch_engine, name):
    ids = some_ids(1, 11)
    with blocks_in(torch_engine, **VARIANTS[name]):
        expected, _ = greedy_by_prefill(torch_engine, ids, 6)
        for options in (
            {},
            {"cache_implementation": "static"},
            {"cache_implementation": "static", "prefill_chunk_size": 3},
            {"prompt_lookup_num_tokens": 3},
        ):
            made = torch_engine.module.generate(
                torch.tensor(ids), max_new_tokens=6, do_sample=False, disable_compile=True, **options
            )
            assert (made[:, 11:].numpy() == expected).all(), options


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["causal", "own"])
def test_a_compiled_decode_step_is_one_graph(torch_engine, name):
    ids = some_ids(1, 9)
    step = torch.compile(torch_engine.module.forward, fullgraph=True, backend="eager")
    with blocks_in(torch_engine, **VARIANTS[name]), torch.inference_mode():
        expected = torch_engine.logits(ids)[:, 5:]
        cache = StaticCache(config=torch_engine.module.config, max_cache_len=12)
        torch_engine.module(input_ids=torch.tensor(ids[:, :5]), past_key_values=cache, use_cache=True)
        steps = [
            step(input_ids=torch.tensor(ids[:, t : t + 1]), past_key_values=cache, position_ids=torch.tensor([[t]]))
            for t in range(5, 9)
        ]
    got = np.concatenate([one.logits.numpy() for one in steps], axis=1)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["causal", "cut", "own"])
def test_beams_carry_the_blocks_own_keys_along(torch_engine, name):
    """Every beam's score is the sum of the log-probabilities that one call over it gives."""
    ids = some_ids(2, 11)
    with blocks_in(torch_engine, **VARIANTS[name]):
        made = torch_engine.module.generate(
            torch.tensor(ids), max_new_tokens=6, num_beams=4, num_return_sequences=4, do_sample=False,
            length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        own = torch_engine.log_probs(made.sequences.numpy())[:, 10:].sum(axis=1)
    assert (made.beam_indices[:, :6].diff(dim=1) != 0).any()  # rows did change places
    np.testing.assert_allclose(made.sequences_scores.numpy(), own, atol=1e-4)


def test_keys_of_its_own_stand_behind_the_models_layers_in_the_cache(torch_engine):
    """Crop and reset then treat them as the layer's, and a block that sees no live token keeps none."""
    ids = torch.tensor(some_ids(1, 6))
    for name, extra in {"none": 0, "causal": 2, "own": 0}.items():
        cache = DynamicCache()
        with blocks_in(torch_engine, **VARIANTS[name]), torch.inference_mode():
            torch_engine.module(input_ids=ids, past_key_values=cache, use_cache=True)
            assert len(cache) == 6 + extra
            cache.crop(-2)
            assert {layer.get_seq_length() for layer in cache.layers} == {4}


def test_weights_of_its_own_begin_as_the_layers_and_learn(torch_folder):
    engine = TorchBackend().load(torch_folder)
    ids, names = torch.tensor(some_ids(2, 9)), set(engine.module.state_dict())
    with blocks_in(engine) as shared:
        assert set(engine.module.state_dict()) == names
        assert not list(shared[2].parameters())
        expected = engine.logits(ids.numpy())
    with blocks_in(engine, trainable=True, gate=0.0) as own:
        block = own[2]
        assert set(dict(block.named_parameters())) == {"gate", *block.spec.weight_shapes()}
        attention = engine.module.model.layers[2].self_attn
        before = attention.q_proj.weight.clone()
        engine.module(input_ids=ids, labels=ids).loss.backward()
        assert block.gate.grad.abs() > 0  # a closed gate learns first
        assert not block.q_proj.weight.grad.any()
        with torch.no_grad():
            for one in own.values():
                one.gate.fill_(1.0)
        np.testing.assert_array_equal(engine.logits(ids.numpy()), expected)
        engine.module(input_ids=ids, labels=ids).loss.backward()
        assert block.q_proj.weight.grad.any()
        with torch.no_grad():
            block.q_proj.weight.mul_(2.0)
        assert (attention.q_proj.weight == before).all()
    assert set(engine.module.state_dict()) == names


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("name", ["causal", "own"])
def test_gradient_checkpointing(torch_folder, name):
    engine, ids = TorchBackend().load(torch_folder), torch.tensor(some_ids(2, 9))
    with blocks_in(engine, trainable=True, **VARIANTS[name]) as blocks:
        model = engine.module.train()

        def gradient() -> torch.Tensor:
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            return blocks[2].q_proj.weight.grad.clone()

        plain = gradient()
        model.gradient_checkpointing_enable()
        assert plain.abs().max() > 0
        torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-6)


def test_a_context_may_come_with_the_call(torch_engine):
    """`external_past_key_values` is another way to the same memory; rows that do not fit are refused."""
    layer = GLOBAL[0]
    decoder, spec = torch_engine.module.model.layers[layer], block_spec(torch_engine, layer)
    static = context_of(torch_engine, spec, layer)
    h = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    tables = torch_engine.module.model.rotary_emb(h, torch.arange(5)[None], "full_attention")
    held = MemoryInjectionBlock(decoder, spec, static)
    given = InjectedAttentionBlock(decoder, spec)
    with torch.inference_mode():
        expected = held(h, tables)
        assert (given(h, tables, external_past_key_values=given.prepare(static)) == expected).all()
        assert (given(h, tables) == h).all()  # nothing to see: y is 0
        three = static._replace(k=static.k.repeat(3, 0), v=static.v.repeat(3, 0), mask=static.mask.repeat(3, 0),
                                positions=static.positions.repeat(3, 0))  # fmt: skip
        with pytest.raises(InputError, match="holds 3 rows and the call 2"):
            given(h, tables, external_past_key_values=given.prepare(three))
        beams = given(h.repeat_interleave(6, 0), tables, external_past_key_values=given.prepare(three))
        torch.testing.assert_close(beams, expected.repeat_interleave(6, 0))


def test_the_memory_follows_the_module(torch_folder):
    engine, ids = TorchBackend().load(torch_folder), some_ids(1, 8)
    with blocks_in(engine) as blocks:
        expected = engine.logits(ids)
        engine.module.to(torch.bfloat16)
        assert blocks[2].static_k.dtype == torch.bfloat16
        logits = engine.logits(ids)
        assert 0 < np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_the_library_gets_its_layers_back(torch_engine):
    ids, layers = some_ids(1, 7), list(torch_engine.module.model.layers)
    plain, classes = torch_engine.logits(ids), [type(layer) for layer in layers]
    with blocks_in(torch_engine):
        assert np.abs(torch_engine.logits(ids) - plain).max() > 0.1
    assert list(torch_engine.module.model.layers) == layers
    assert [type(layer) for layer in layers] == classes
    assert not any(hasattr(layer, "injected") for layer in layers)
    assert (torch_engine.logits(ids) == plain).all()


def test_a_closed_gate_hides_what_is_not_finite():
    h, wild = torch.tensor([[[-0.0, 2.0]]]), torch.tensor([[[torch.inf, torch.nan]]])
    closed = join(h, wild, torch.tensor(0.0), residual=True)
    assert (closed.view(torch.int32) == h.view(torch.int32)).all()


def as_layer(module: torch.nn.Module) -> torch.nn.Module:
    module.layer_idx = 0
    return module


def test_refusals(torch_engine):
    ids, layer = torch.tensor(some_ids(1, 4)), GLOBAL[0]
    decoder = torch_engine.module.model.layers[layer]
    own = block_spec(torch_engine, layer, source="own")
    static = context_of(torch_engine, block_spec(torch_engine, layer), layer)
    with pytest.raises(InputError, match="source='own' reads the model's own cache and no context"):
        MemoryInjectionBlock(decoder, own, static)
    h, alone = torch.zeros(1, 4, 32), InjectedAttentionBlock(decoder, own)
    tables = torch_engine.module.model.rotary_emb(h, torch.arange(4)[None], "full_attention")
    with pytest.raises(InputError, match="needs the WatchedCache"):
        alone(h, tables, past_key_values=DynamicCache())
    with pytest.raises(InputError, match=r"of the class Linear with the parts \[\]; a block goes into a plain"):
        check_place(as_layer(torch.nn.Linear(1, 1)))
    half = block_spec(torch_engine, layer, split=HeadSplit((2, 3)))
    with pytest.raises(InputError, match="hold 2 KV heads"):
        MemoryInjectionBlock(decoder, half, static)
    with pytest.raises(InputError, match=r"qk_norm.eps \(0.5, 1e-06\) does not fit a layer whose norms have \(1e-06"):
        InjectedAttentionBlock(decoder, own.replace(norm_eps=0.5))
    cache = DynamicCache(config=torch_engine.module.config)
    with torch.inference_mode():
        torch_engine.module(input_ids=ids, past_key_values=cache, use_cache=True)
        with blocks_in(torch_engine, live="causal") as blocks:
            with pytest.raises(InputError, match="holds 4 earlier tokens of the layer and 0 of the block"):
                torch_engine.module(input_ids=ids, past_key_values=cache, use_cache=True)
            with pytest.raises(InputError, match="layer 2 has a block; take it out first"):
                inject(decoder, blocks[layer])
            other = Cache(layers=[DynamicSlidingWindowLayer(WINDOW) for _ in range(6)])
            with pytest.raises(InputError, match="this cache has a DynamicSlidingWindowLayer"):
                torch_engine.module(input_ids=ids, past_key_values=other, use_cache=True)


def test_a_watched_cache_is_the_cache_itself():
    cache = DynamicCache()
    watched = WatchedCache(cache)
    k, v = torch.ones(2, 1, 1, 3, 4)
    watched.update(k, v, 0)
    assert watched.get_seq_length(0) == 3
    assert watched.is_compileable == cache.is_compileable
    assert len(watched.layers) == 1
    with pytest.raises(AttributeError):
        _ = WatchedCache(None).layers
