"""The PyTorch engine, on a small random Gemma-3 that is saved to a folder and loaded from it."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_gemma import (
    CONTEXT,
    GLOBAL,
    SIZES,
    SPLITS,
    VOCAB,
    WINDOW,
    attach,
    context_for,
    greedy_by_prefill,
    left_padded,
    save_random_model,
    some_ids,
    token_by_token,
)
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from lyra.backends.protocol import Engine, ModelBackend
from lyra.backends.torch_impl import TorchBackend, versions
from lyra.spec import HeadSplit, InputError, SpecError, StaticSpec
from lyra.spec.inputs import StaticLayer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_protocol(torch_engine, torch_folder):
    assert isinstance(TorchBackend(), ModelBackend)
    assert all(hasattr(torch_engine, name) for name in Engine.__annotations__)
    assert isinstance(torch_engine.module, Gemma3ForCausalLM)
    assert torch_engine.spec.global_layers == GLOBAL
    assert torch_engine.spec.attention.rope.factor == 8.0
    assert torch_engine.spec.attention.scale == 20**-0.5


def test_without_a_context_it_is_hugging_face_bit_for_bit(torch_engine, torch_folder):
    ids = some_ids(2, 21)
    plain = Gemma3ForCausalLM.from_pretrained(torch_folder, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor(ids)).logits.numpy()
    assert (torch_engine.logits(ids) == expected).all()


def test_log_probs(torch_engine, monkeypatch):
    ids = some_ids(2, 13)
    logits = torch_engine.logits(ids).astype(np.float64)[:, :-1]
    logits -= logits.max(axis=-1, keepdims=True)
    table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = np.take_along_axis(table, ids[:, 1:, None], axis=2)[..., 0]
    whole = torch_engine.log_probs(ids)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    monkeypatch.setattr("lyra.backends.torch_impl.logits.LOGITS_AT_ONCE", 5 * VOCAB)
    np.testing.assert_allclose(torch_engine.log_probs(ids), expected, atol=1e-5)
    assert torch_engine.log_probs(ids[:, :1]).shape == (2, 0)


@pytest.mark.parametrize("chunk_size", [1, 3, 7])
def test_capture_in_chunks(torch_engine, chunk_size):
    ids, done = some_ids(1, 3 * WINDOW + 2), []
    whole = torch_engine.capture(ids, GLOBAL)
    parts = torch_engine.capture(ids, GLOBAL, chunk_size=chunk_size, on_chunk=done.append)
    assert done[-1] == ids.shape[1]
    assert len(done) == -(-ids.shape[1] // chunk_size)
    for layer in GLOBAL:
        for a, b in zip(whole[layer], parts[layer], strict=True):
            assert a.shape == (1, 2, ids.shape[1], 16)
            assert a.dtype == np.float32
            assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_capture_holds_what_the_definition_says(torch_engine):
    """k is k_norm of the projection, not rotated, and v the bare projection, of the layer's normed input."""
    ids, seen = some_ids(1, 11), {}
    layer = torch_engine.module.model.layers[GLOBAL[0]]
    hook = layer.input_layernorm.register_forward_hook(lambda _m, _i, out: seen.update(x=out[0].double().numpy()))
    captured = torch_engine.capture(ids, GLOBAL[:1])[GLOBAL[0]]
    hook.remove()
    weights = {name: value.astype(np.float64) for name, value in torch_engine.attention_weights(GLOBAL[0]).items()}
    k, v = ((seen["x"] @ weights[f"{n}_proj.weight"].T).reshape(11, 2, 16).swapaxes(0, 1) for n in "kv")
    k = k / np.sqrt((k**2).mean(-1, keepdims=True) + 1e-6) * (1 + weights["k_norm.weight"])
    np.testing.assert_allclose(captured.k[0], k, atol=2e-5)
    np.testing.assert_allclose(captured.v[0], v, atol=2e-5)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("live", ["causal", "self", "none"])
@pytest.mark.parametrize("positions", ["continue", "overlay"])
def test_a_layer_equals_the_attention_level(torch_engine, split, live, positions):
    """The swapped module on the layer's own input gives the heads of the attention-level backend."""
    ids, layer, seen = some_ids(2, 6), GLOBAL[0], {}
    bound = SPLITS[split].bind(torch_engine.spec)
    static = context_for(torch_engine, {layer: bound})
    torch_engine.attach(static, {layer: bound}, StaticSpec(live, positions))
    module = torch_engine.module.model.layers[layer].self_attn
    hooks = [
        module.register_forward_pre_hook(lambda _m, _a, kw: seen.update(x=kw["hidden_states"]), with_kwargs=True),
        module.o_proj.register_forward_pre_hook(lambda _m, args: seen.update(heads=args[0])),
    ]
    torch_engine.logits(ids)
    for hook in hooks:
        hook.remove()
    spec = torch_engine.spec.attention.replace(split=bound, static=StaticSpec(live, positions))
    alone = TorchBackend().attention(spec, torch_engine.attention_weights(layer))
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


def test_a_checkpoint_that_lacks_weights_is_refused(torch_folder, tmp_path):
    weights = load_file(f"{torch_folder}/model.safetensors")
    del weights["model.layers.3.self_attn.k_norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(f"{torch_folder}/config.json", tmp_path)
    with pytest.raises(
        InputError, match=r"1 tensors that config.json asks for are missing, among them model.layers.3.self_attn.k_norm"
    ):
        TorchBackend().load(str(tmp_path))


def test_no_lyra_heads_is_the_plain_model(torch_engine):
    ids = some_ids(2, 12)
    plain = torch_engine.logits(ids)
    torch_engine.attach({}, dict.fromkeys(GLOBAL, HeadSplit.none()), StaticSpec())
    assert (torch_engine.logits(ids) == plain).all()


def test_an_empty_context_is_the_plain_model(torch_engine):
    ids, splits = some_ids(2, 12), dict.fromkeys(GLOBAL, SPLITS["cut"])
    plain = torch_engine.logits(ids)
    static = {
        layer: one._replace(mask=np.zeros((1, CONTEXT), bool))
        for layer, one in context_for(torch_engine, splits).items()
    }
    torch_engine.attach(static, splits, StaticSpec())
    assert (torch_engine.logits(ids) == plain).all()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("live", ["causal", "self", "none"])
def test_prefill_is_decode(torch_engine, split, live):
    attach(torch_engine, SPLITS[split], live)
    ids = some_ids(2, 14)
    plain, expected = torch_engine.logits(ids), token_by_token(torch_engine, ids)
    assert np.isfinite(plain).all()
    np.testing.assert_allclose(plain, expected, atol=1e-4 * np.abs(expected).max())
    tokens, _ = greedy_by_prefill(torch_engine, ids, 6)
    assert (torch_engine.generate(ids, max_new_tokens=6) == tokens).all()


@pytest.mark.parametrize("live", ["causal", "self", "none"])
@pytest.mark.parametrize("positions", ["continue", "overlay"])
def test_every_mode_has_an_effect_of_its_own(torch_engine, live, positions):
    ids = some_ids(1, 9)
    seen = [torch_engine.logits(ids)]
    for other in [("causal", "continue"), ("causal", "overlay"), ("self", "continue"), ("none", "continue")]:
        if other != (live, positions):
            attach(torch_engine, SPLITS["half"], *other)
            seen.append(torch_engine.logits(ids))
            torch_engine.detach()
    attach(torch_engine, SPLITS["half"], live, positions)
    ours = torch_engine.logits(ids)
    assert all(np.abs(ours - other).max() > 1e-3 for other in seen)


def test_detach_restores_the_bits_and_the_modules(torch_engine):
    ids = some_ids(2, 12)
    plain = torch_engine.logits(ids)
    before = [layer.self_attn for layer in torch_engine.module.model.layers]
    names = set(torch_engine.module.state_dict())
    attach(torch_engine, SPLITS["cut"])
    attached = torch_engine.logits(ids)
    assert np.abs(attached - plain).max() > 1e-3
    assert set(torch_engine.module.state_dict()) == names
    assert memory(torch_engine.module.model.layers[2].self_attn) == memory(before[2])
    attach_again = context_for_attached(torch_engine)
    torch_engine.attach(attach_again, dict.fromkeys(GLOBAL, SPLITS["half"]), StaticSpec("self"))
    torch_engine.detach()
    assert [layer.self_attn for layer in torch_engine.module.model.layers] == before
    assert (torch_engine.logits(ids) == plain).all()


def memory(module: torch.nn.Module) -> set[int]:
    """Where a module's parameters lie."""
    return {one.untyped_storage().data_ptr() for one in module.parameters() if one.numel()}


def context_for_attached(engine) -> dict[int, StaticLayer]:
    random = np.random.default_rng(5)
    k, v = random.normal(size=(2, 1, 1, 4, 16)).astype(np.float32)
    one = StaticLayer(k, v, np.ones((1, 4), bool), np.arange(4)[None])
    return dict.fromkeys(GLOBAL, one)


@pytest.mark.parametrize("live", ["causal", "self", "none"])
def test_left_padding_changes_nothing(torch_engine, live):
    attach(torch_engine, SPLITS["cut"], live)
    rows = [some_ids(1, 15, 1)[0], some_ids(1, 6, 2)[0], some_ids(1, 11, 3)[0]]
    ids, mask = left_padded(rows)
    logits, new = torch_engine.logits(ids, mask), torch_engine.generate(ids, mask, max_new_tokens=5)
    scores = torch_engine.log_probs(ids, mask)
    assert np.isfinite(logits).all()
    for i, row in enumerate(rows):
        alone = torch_engine.logits(row[None])[0]
        np.testing.assert_allclose(logits[i, -len(row) :], alone, atol=1e-4 * np.abs(alone).max())
        assert (torch_engine.generate(row[None], max_new_tokens=5)[0] == new[i]).all()
        np.testing.assert_allclose(scores[i, 1 - len(row) :], torch_engine.log_probs(row[None])[0], atol=1e-3)


def test_right_padding_changes_nothing(torch_engine):
    attach(torch_engine, SPLITS["half"])
    ids = some_ids(2, 10)
    mask = np.arange(10)[None] < np.array([[10], [6]])
    alone = torch_engine.logits(ids[1:, :6])
    np.testing.assert_allclose(torch_engine.logits(ids, mask)[1:, :6], alone, atol=1e-4 * np.abs(alone).max())


def test_a_context_of_one_row_serves_three_and_rows_may_have_their_own(torch_engine):
    splits = dict.fromkeys(GLOBAL, SPLITS["half"])
    one, two = context_for(torch_engine, splits, 7), context_for(torch_engine, splits, 8)
    ids = some_ids(3, 9)
    torch_engine.attach(one, splits, StaticSpec())
    shared = torch_engine.logits(ids)
    for i in range(3):
        np.testing.assert_allclose(
            shared[i : i + 1], torch_engine.logits(ids[i : i + 1]), atol=1e-4 * np.abs(shared).max()
        )
    rows = {
        layer: StaticLayer(*(np.concatenate(parts) for parts in zip(one[layer], two[layer], strict=True)))
        for layer in GLOBAL
    }
    for layer in GLOBAL:
        rows[layer].mask[1, 12:] = False
    torch_engine.attach(rows, splits, StaticSpec())
    both = torch_engine.logits(ids[:2])
    np.testing.assert_allclose(both[0], shared[0], atol=1e-4 * np.abs(shared).max())
    shorter = {layer: StaticLayer(*(part[1:] for part in rows[layer])) for layer in GLOBAL}
    torch_engine.attach(shorter, splits, StaticSpec())
    np.testing.assert_allclose(both[1:], torch_engine.logits(ids[1:2]), atol=1e-4 * np.abs(shared).max())
    torch_engine.attach(rows, splits, StaticSpec())
    with pytest.raises(InputError, match="ids has 3 rows; the attached context has 2"):
        torch_engine.logits(ids)


def test_attention_weights(torch_engine):
    for layer in (0, 2):
        weights = torch_engine.attention_weights(layer)
        shapes = {name: value.shape for name, value in weights.items()}
        assert shapes == torch_engine.spec.layer(layer).weight_shapes()
    weights["q_proj.weight"][:] = 0
    assert (torch_engine.attention_weights(2)["q_proj.weight"] != 0).any()


def test_refusals(torch_engine, torch_folder):
    ids, splits = some_ids(1, 5), dict.fromkeys(GLOBAL, SPLITS["half"])
    static = context_for(torch_engine, splits)
    with pytest.raises(InputError, match=r"layers \[1\] are not global"):
        torch_engine.attach({}, {1: SPLITS["half"]}, StaticSpec())
    with pytest.raises(InputError, match="no Lyra heads"):
        torch_engine.attach(static, {2: SPLITS["half"]}, StaticSpec())
    with pytest.raises(InputError, match="hold 1 KV heads"):
        torch_engine.attach(static, dict.fromkeys(GLOBAL, SPLITS["all"]), StaticSpec())
    with pytest.raises(SpecError, match="cuts a GQA group"):
        torch_engine.attach(static, dict.fromkeys(GLOBAL, HeadSplit((0, 3))), StaticSpec())
    torch_engine.attach(static, splits, StaticSpec())
    with pytest.raises(InputError, match="detach"):
        torch_engine.capture(ids, GLOBAL)
    torch_engine.detach()
    with pytest.raises(InputError, match="2 rows"):
        torch_engine.capture(some_ids(2, 4), GLOBAL)
    with pytest.raises(InputError, match=r"no layers \[6\]"):
        torch_engine.capture(ids, [6])
    with pytest.raises(InputError, match="padding on the left"):
        torch_engine.generate(ids, np.array([[True, True, True, True, False]]), max_new_tokens=1)
    with pytest.raises(InputError, match="vocabulary has ids 0 to 96"):
        torch_engine.logits(np.array([[97]]))
    with pytest.raises(InputError, match="mask has shape"):
        torch_engine.logits(ids, np.ones((1, 4), bool))
    with pytest.raises(InputError, match="dtype is 'int8'"):
        TorchBackend().load(torch_folder, dtype="int8")


@pytest.mark.parametrize(
    ("version", "fits"), [("5.19.9", False), ("5.20.0", True), ("5.23.0.dev0", True), ("6.0.0", False)]
)
def test_transformers_versions(version, fits):
    if fits:
        versions.check_transformers(version)
    else:
        with pytest.raises(ImportError, match=r"transformers>=5\.20,<6"):
            versions.check_transformers(version)


def test_the_versions_that_are_installed_are_those_that_are_checked():
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = f"transformers>={versions.OLDEST[0]}.{versions.OLDEST[1]},<{versions.TOO_NEW[0]}"
    assert [name for name, needs in extras.items() if wanted in needs] == ["torch", "conformance"]
    pinned = re.search(r"^transformers==(.*)$", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    versions.check_transformers(pinned[1])
