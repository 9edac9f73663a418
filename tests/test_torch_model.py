"""The PyTorch engine, on a small random Gemma-3 that is saved to a folder and loaded from it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from lyra.backends.protocol import Engine, ModelBackend
from lyra.backends.torch_impl import TorchBackend, versions
from lyra.spec import HeadSplit, InputError, SpecError, StaticSpec
from lyra.spec.inputs import StaticLayer

WINDOW, VOCAB, GLOBAL = 8, 97, (2, 5)
CONTEXT = 20
SPLITS = {
    "half": HeadSplit((2, 3)),
    "cut": HeadSplit((0, 3), share_kv=True),
    "all": HeadSplit((0, 1, 2, 3)),
}


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW,
    "layer_types": ["full_attention" if i in GLOBAL else "sliding_attention" for i in range(6)],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": None,
}


def save_random_model(config: Gemma3TextConfig, path) -> None:
    """A checkpoint with random weights, norm weights too: at zero they would hide a wrong order of stages."""
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """Six layers, two of them global, RoPE factor 8 on these."""
    path = tmp_path_factory.mktemp("gemma")
    save_random_model(Gemma3TextConfig(**SIZES), path)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Products this small are not worth waking a second thread for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_engine(folder):
    return TorchBackend().load(folder)


@pytest.fixture
def engine(shared_engine):
    """The plain model; a test that changes the module itself loads its own."""
    yield shared_engine
    shared_engine.detach()


def some_ids(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, (rows, tokens))


def context_for(engine, splits: dict[int, HeadSplit], seed: int = 7, tokens: int = CONTEXT) -> dict[int, StaticLayer]:
    captured = engine.capture(some_ids(1, tokens, seed), list(splits))
    positions = np.arange(tokens)[None]
    return {
        layer: StaticLayer(
            captured[layer].k[:, list(split.bind(engine.spec).lyra_kv_heads)],
            captured[layer].v[:, list(split.bind(engine.spec).lyra_kv_heads)],
            np.ones((1, tokens), dtype=bool),
            positions,
        )
        for layer, split in splits.items()
    }


def attach(engine, split: HeadSplit, live: str = "causal", positions: str = "continue") -> None:
    splits = dict.fromkeys(GLOBAL, split)
    engine.attach(context_for(engine, splits), splits, StaticSpec(live, positions))


def left_padded(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    width = max(len(row) for row in rows)
    ids = np.stack([np.concatenate((np.zeros(width - len(row), dtype=int), row)) for row in rows])
    mask = np.stack([np.arange(width) >= width - len(row) for row in rows])
    return ids, mask


def greedy_by_prefill(engine, ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The greedy continuation, computed from scratch at each step: tokens [B,count] and the last logits."""
    start = ids.shape[1]
    for _ in range(count):
        logits = engine.logits(ids)[:, -1]
        ids = np.concatenate((ids, logits.argmax(-1)[:, None]), axis=1)
    return ids[:, start:], logits


def token_by_token(engine, ids: np.ndarray) -> np.ndarray:
    """Logits [B,T,V] of a run that feeds one token a call."""
    cache = DynamicCache(config=engine.module.config)
    with torch.inference_mode():
        steps = [
            engine.module(input_ids=torch.tensor(ids[:, t : t + 1]), past_key_values=cache, use_cache=True).logits
            for t in range(ids.shape[1])
        ]
    return torch.cat(steps, dim=1).numpy()


def test_protocol(engine, folder):
    assert isinstance(TorchBackend(), ModelBackend)
    assert all(hasattr(engine, name) for name in Engine.__annotations__)
    assert isinstance(engine.module, Gemma3ForCausalLM)
    assert engine.spec.global_layers == GLOBAL
    assert engine.spec.attention.rope.factor == 8.0
    assert engine.spec.attention.scale == 20**-0.5


def test_without_a_context_it_is_hugging_face_bit_for_bit(engine, folder):
    ids = some_ids(2, 21)
    plain = Gemma3ForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor(ids)).logits.numpy()
    assert (engine.logits(ids) == expected).all()


def test_log_probs(engine, monkeypatch):
    ids = some_ids(2, 13)
    logits = engine.logits(ids).astype(np.float64)[:, :-1]
    logits -= logits.max(axis=-1, keepdims=True)
    table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(table, ids[:, 1:, None], axis=2)[..., 0]
    whole = engine.log_probs(ids)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    monkeypatch.setattr("lyra.backends.torch_impl.model.LOGITS_AT_ONCE", 5 * VOCAB)
    np.testing.assert_allclose(engine.log_probs(ids), expected, atol=1e-5)
    assert engine.log_probs(ids[:, :1]).shape == (2, 0)


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_capture_in_chunks(engine, chunk_size):
    ids, done = some_ids(1, 3 * WINDOW + 2), []
    whole = engine.capture(ids, GLOBAL)
    parts = engine.capture(ids, GLOBAL, chunk_size=chunk_size, on_chunk=done.append)
    assert done[-1] == ids.shape[1]
    assert len(done) == -(-ids.shape[1] // chunk_size)
    for layer in GLOBAL:
        for a, b in zip(whole[layer], parts[layer], strict=True):
            assert a.shape == (1, 2, ids.shape[1], 16)
            assert a.dtype == np.float32
            assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_capture_holds_what_the_definition_says(engine):
    """k is k_norm of the projection, not rotated, and v the bare projection, of the layer's normed input."""
    ids, seen = some_ids(1, 11), {}
    layer = engine.module.model.layers[GLOBAL[0]]
    hook = layer.input_layernorm.register_forward_hook(lambda _m, _i, out: seen.update(x=out[0].double().numpy()))
    captured = engine.capture(ids, GLOBAL[:1])[GLOBAL[0]]
    hook.remove()
    weights = {name: value.astype(np.float64) for name, value in engine.attention_weights(GLOBAL[0]).items()}
    k, v = ((seen["x"] @ weights[f"{n}_proj.weight"].T).reshape(11, 2, 16).swapaxes(0, 1) for n in "kv")
    k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) * (1 + weights["k_norm.weight"])
    np.testing.assert_allclose(captured.k[0], k, atol=2e-5)
    np.testing.assert_allclose(captured.v[0], v, atol=2e-5)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("live", ["causal", "self", "none"])
@pytest.mark.parametrize("positions", ["continue", "overlay"])
def test_a_layer_equals_the_attention_level(engine, split, live, positions):
    """The swapped module on the layer's own input gives the heads of the attention-level backend."""
    ids, layer, seen = some_ids(2, 6), GLOBAL[0], {}
    bound = SPLITS[split].bind(engine.spec)
    static = context_for(engine, {layer: bound})
    engine.attach(static, {layer: bound}, StaticSpec(live, positions))
    module = engine.module.model.layers[layer].self_attn
    hooks = [
        module.register_forward_pre_hook(lambda _m, _a, kw: seen.update(x=kw["hidden_states"]), with_kwargs=True),
        module.o_proj.register_forward_pre_hook(lambda _m, args: seen.update(heads=args[0])),
    ]
    engine.logits(ids)
    for hook in hooks:
        hook.remove()
    spec = engine.spec.attention.replace(split=bound, static=StaticSpec(live, positions))
    alone = TorchBackend().attention(spec, engine.attention_weights(layer))
    where = np.tile(np.arange(6), (2, 1))
    heads = alone(seen["x"].numpy(), positions=where, static=static[layer], trace=True).trace["heads"]
    np.testing.assert_allclose(seen["heads"].numpy(), heads.reshape(2, 6, -1), atol=1e-5)


def test_a_context_for_all_heads_is_a_prefix(tmp_path):
    """In a model of one global layer, a context of all heads is the same as the tokens in front of the live ones."""
    config = Gemma3TextConfig(**(SIZES | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}))
    save_random_model(config, tmp_path)
    engine = TorchBackend().load(str(tmp_path))
    split = HeadSplit.all(engine.spec)
    prefix, ids = some_ids(1, CONTEXT, seed=7), some_ids(1, 9)
    expected = engine.logits(np.concatenate((prefix, ids), axis=1))[:, CONTEXT:]
    engine.attach(context_for(engine, {0: split}), {0: split}, StaticSpec())
    np.testing.assert_allclose(engine.logits(ids), expected, atol=2e-5 * np.abs(expected).max())


def test_a_multimodal_checkpoint_gives_its_text_model(tmp_path):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=SIZES, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path)
    ids = some_ids(1, 12)
    with torch.inference_mode():
        expected = whole(input_ids=torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(TorchBackend().load(str(tmp_path)).logits(ids), expected, atol=1e-5)


def test_a_checkpoint_that_lacks_weights_is_refused(folder, tmp_path):
    weights = load_file(f"{folder}/model.safetensors")
    del weights["model.layers.3.self_attn.k_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(f"{folder}/config.json", tmp_path)
    with pytest.raises(InputError, match=r"lacks 1 weights, the first being \['model.layers.3.self_attn.k_norm"):
        TorchBackend().load(str(tmp_path))


def test_no_lyra_heads_is_the_plain_model(engine):
    ids = some_ids(2, 12)
    plain = engine.logits(ids)
    engine.attach({}, dict.fromkeys(GLOBAL, HeadSplit.none()), StaticSpec())
    assert (engine.logits(ids) == plain).all()


def test_an_empty_context_is_the_plain_model(engine):
    ids, splits = some_ids(2, 12), dict.fromkeys(GLOBAL, SPLITS["cut"])
    plain = engine.logits(ids)
    static = {
        layer: one._replace(mask=np.zeros((1, CONTEXT), bool)) for layer, one in context_for(engine, splits).items()
    }
    engine.attach(static, splits, StaticSpec())
    assert (engine.logits(ids) == plain).all()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("live", ["causal", "self", "none"])
def test_prefill_is_decode(engine, split, live):
    attach(engine, SPLITS[split], live)
    ids = some_ids(2, 14)
    plain, expected = engine.logits(ids), token_by_token(engine, ids)
    assert np.isfinite(plain).all()
    np.testing.assert_allclose(plain, expected, atol=1e-4 * np.abs(expected).max())
    tokens, _ = greedy_by_prefill(engine, ids, 6)
    assert (engine.generate(ids, max_new_tokens=6) == tokens).all()


@pytest.mark.parametrize("live", ["causal", "self", "none"])
@pytest.mark.parametrize("positions", ["continue", "overlay"])
def test_every_mode_has_an_effect_of_its_own(engine, live, positions):
    ids = some_ids(1, 9)
    seen = [engine.logits(ids)]
    for other in [("causal", "continue"), ("causal", "overlay"), ("self", "continue"), ("none", "continue")]:
        if other != (live, positions):
            attach(engine, SPLITS["half"], *other)
            seen.append(engine.logits(ids))
            engine.detach()
    attach(engine, SPLITS["half"], live, positions)
    ours = engine.logits(ids)
    assert all(np.abs(ours - other).max() > 1e-3 for other in seen)


def test_detach_restores_the_bits_and_the_modules(engine):
    ids = some_ids(2, 12)
    plain = engine.logits(ids)
    before = [layer.self_attn for layer in engine.module.model.layers]
    names = list(engine.module.state_dict())
    attach(engine, SPLITS["cut"])
    attached = engine.logits(ids)
    assert np.abs(attached - plain).max() > 1e-3
    assert list(engine.module.state_dict()) == names
    own = [parameter.data_ptr() for parameter in engine.module.model.layers[2].self_attn.parameters()]
    assert own == [parameter.data_ptr() for parameter in before[2].parameters()]
    attach_again = context_for_attached(engine)
    engine.attach(attach_again, dict.fromkeys(GLOBAL, SPLITS["half"]), StaticSpec("self"))
    engine.detach()
    assert [layer.self_attn for layer in engine.module.model.layers] == before
    assert (engine.logits(ids) == plain).all()


def context_for_attached(engine) -> dict[int, StaticLayer]:
    random = np.random.default_rng(5)
    k, v = random.normal(size=(2, 1, 1, 4, 16)).astype(np.float32)
    one = StaticLayer(k, v, np.ones((1, 4), bool), np.arange(4)[None])
    return dict.fromkeys(GLOBAL, one)


@pytest.mark.parametrize("live", ["causal", "self", "none"])
def test_left_padding_changes_nothing(engine, live):
    attach(engine, SPLITS["cut"], live)
    rows = [some_ids(1, 15, 1)[0], some_ids(1, 6, 2)[0], some_ids(1, 11, 3)[0]]
    ids, mask = left_padded(rows)
    logits, new = engine.logits(ids, mask), engine.generate(ids, mask, max_new_tokens=5)
    scores = engine.log_probs(ids, mask)
    assert np.isfinite(logits).all()
    for i, row in enumerate(rows):
        alone = engine.logits(row[None])[0]
        np.testing.assert_allclose(logits[i, -len(row) :], alone, atol=1e-4 * np.abs(alone).max())
        assert (engine.generate(row[None], max_new_tokens=5)[0] == new[i]).all()
        np.testing.assert_allclose(scores[i, 1 - len(row) :], engine.log_probs(row[None])[0], atol=1e-3)


def test_right_padding_changes_nothing(engine):
    attach(engine, SPLITS["half"])
    ids = some_ids(2, 10)
    mask = np.arange(10)[None] < np.array([[10], [6]])
    alone = engine.logits(ids[1:, :6])
    np.testing.assert_allclose(engine.logits(ids, mask)[1:, :6], alone, atol=1e-4 * np.abs(alone).max())


def test_a_context_of_one_row_serves_three_and_rows_may_have_their_own(engine):
    splits = dict.fromkeys(GLOBAL, SPLITS["half"])
    one, two = context_for(engine, splits, 7), context_for(engine, splits, 8)
    ids = some_ids(3, 9)
    engine.attach(one, splits, StaticSpec())
    shared = engine.logits(ids)
    for i in range(3):
        np.testing.assert_allclose(shared[i : i + 1], engine.logits(ids[i : i + 1]), atol=1e-4 * np.abs(shared).max())
    rows = {
        layer: StaticLayer(*(np.concatenate(parts) for parts in zip(one[layer], two[layer], strict=True)))
        for layer in GLOBAL
    }
    for layer in GLOBAL:
        rows[layer].mask[1, 12:] = False
    engine.attach(rows, splits, StaticSpec())
    both = engine.logits(ids[:2])
    np.testing.assert_allclose(both[0], shared[0], atol=1e-4 * np.abs(shared).max())
    shorter = {layer: StaticLayer(*(part[1:] for part in rows[layer])) for layer in GLOBAL}
    engine.attach(shorter, splits, StaticSpec())
    np.testing.assert_allclose(both[1:], engine.logits(ids[1:2]), atol=1e-4 * np.abs(shared).max())
    engine.attach(rows, splits, StaticSpec())
    with pytest.raises(InputError, match="holds 2 rows and the call 3"):
        engine.logits(ids)


def test_generation_stops_and_reports_each_token(engine):
    ids, steps = some_ids(2, 7), []
    free = engine.generate(ids, max_new_tokens=8, on_token=steps.append)
    assert free.shape == (2, 8)
    assert (np.stack(steps, axis=1) == free).all()
    stop = int(free[0, 2])
    first = [int(np.flatnonzero(row == stop)[0]) if stop in row else 8 for row in free]
    stopped = engine.generate(ids, max_new_tokens=8, stop_ids=[stop])
    assert stopped.shape[1] == min(8, max(first) + 1)
    for row, whole, end in zip(stopped, free, first, strict=True):
        assert (row[: end + 1] == whole[: end + 1][: len(row)]).all()
        assert (row[end + 1 :] == stop).all()
    assert engine.generate(ids, max_new_tokens=0).shape == (2, 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static", "prefill_chunk_size": 3},
        {"num_beams": 1, "prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_hugging_faces_own_generation_works_while_attached(engine, options):
    attach(engine, SPLITS["cut"])
    ids = some_ids(1, 11)
    expected = engine.generate(ids, max_new_tokens=7)
    made = engine.module.generate(torch.tensor(ids), max_new_tokens=7, do_sample=False, disable_compile=True, **options)
    assert (made[:, 11:].numpy() == expected).all()


def test_beam_search_works_while_attached(engine):
    """Every beam's score is the sum of the log-probabilities that the engine itself gives."""
    attach(engine, SPLITS["cut"])
    ids = some_ids(2, 11)
    made = engine.module.generate(
        torch.tensor(ids), max_new_tokens=4, num_beams=3, do_sample=False, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    own = engine.log_probs(made.sequences.numpy())[:, 10:].sum(axis=1)
    np.testing.assert_allclose(made.sequences_scores.numpy(), own, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_training_with_gradient_checkpointing_works_while_attached(folder):
    engine = TorchBackend().load(folder)
    attach(engine, SPLITS["cut"])
    ids = torch.tensor(some_ids(2, 9))
    model = engine.module.train()
    weight = model.model.layers[2].self_attn.q_proj.weight

    def gradient():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return weight.grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable()
    assert plain.abs().max() > 0
    torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-6)


def test_the_context_follows_the_module(folder):
    engine = TorchBackend().load(folder)
    attach(engine, SPLITS["half"])
    expected = engine.logits(some_ids(1, 8))
    module = engine.module.to(torch.bfloat16)
    assert module.model.layers[2].self_attn.static_k.dtype == torch.bfloat16
    assert module.model.layers[2].self_attn.static_v.stride(-2) == 1
    logits = engine.logits(some_ids(1, 8))
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()


def test_attention_weights(engine):
    for layer in (0, 2):
        weights = engine.attention_weights(layer)
        shapes = {name: value.shape for name, value in weights.items()}
        assert shapes == engine.spec.layer(layer).weight_shapes()
    weights["q_proj.weight"][:] = 0
    assert (engine.attention_weights(2)["q_proj.weight"] != 0).any()


def test_refusals(engine, folder):
    ids, splits = some_ids(1, 5), dict.fromkeys(GLOBAL, SPLITS["half"])
    static = context_for(engine, splits)
    with pytest.raises(InputError, match=r"layers \[1\] are not global"):
        engine.attach({}, {1: SPLITS["half"]}, StaticSpec())
    with pytest.raises(InputError, match="no Lyra heads"):
        engine.attach(static, {2: SPLITS["half"]}, StaticSpec())
    with pytest.raises(InputError, match="hold 1 KV heads"):
        engine.attach(static, dict.fromkeys(GLOBAL, SPLITS["all"]), StaticSpec())
    with pytest.raises(SpecError, match="cuts a GQA group"):
        engine.attach(static, dict.fromkeys(GLOBAL, HeadSplit((0, 3))), StaticSpec())
    engine.attach(static, splits, StaticSpec())
    with pytest.raises(InputError, match="detach"):
        engine.capture(ids, GLOBAL)
    engine.detach()
    with pytest.raises(InputError, match="2 rows"):
        engine.capture(some_ids(2, 4), GLOBAL)
    with pytest.raises(InputError, match=r"no layers \[6\]"):
        engine.capture(ids, [6])
    with pytest.raises(InputError, match="padding on the left"):
        engine.generate(ids, np.array([[True, True, True, True, False]]), max_new_tokens=1)
    with pytest.raises(InputError, match="vocabulary has ids 0 to 96"):
        engine.logits(np.array([[97]]))
    with pytest.raises(InputError, match="mask has shape"):
        engine.logits(ids, np.ones((1, 4), bool))
    with pytest.raises(InputError, match="dtype is 'int8'"):
        TorchBackend().load(folder, dtype="int8")


@pytest.mark.parametrize(
    ("version", "fits"), [("5.19.9", False), ("5.20.0", True), ("5.23.0.dev0", True), ("6.0.0", False)]
)
def test_transformers_versions(version, fits):
    if fits:
        versions.check_transformers(version)
    else:
        with pytest.raises(ImportError, match=r"transformers>=5\.20,<6"):
            versions.check_transformers(version)
