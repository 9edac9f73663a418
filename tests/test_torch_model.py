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
    GLOBAL,
    SIZES,
    SPLITS,
    attach,
    context_for,
    some_ids,
)
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from lyra.backends.torch_impl import TorchBackend, versions
from lyra.spec import InputError, StaticSpec
from lyra.spec.inputs import StaticLayer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_without_a_context_it_is_hugging_face_bit_for_bit(torch_engine, torch_folder):
    ids = some_ids(2, 21)
    plain = Gemma3ForCausalLM.from_pretrained(torch_folder, attn_implementation="sdpa").eval()
    with torch.inference_mode():
        expected = plain(input_ids=torch.tensor(ids)).logits.numpy()
    assert (torch_engine.logits(ids) == expected).all()


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
    return {parameter.untyped_storage().data_ptr() for parameter in module.parameters() if parameter.numel()}


def context_for_attached(engine) -> dict[int, StaticLayer]:
    random = np.random.default_rng(5)
    k, v = random.normal(size=(2, 1, 1, 4, 16)).astype(np.float32)
    one = StaticLayer(k, v, np.ones((1, 4), bool), np.arange(4)[None])
    return dict.fromkeys(GLOBAL, one)


def test_another_dtype_is_refused(torch_folder):
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
