"""The Hugging Face oracle on the layers of whole models: a small random Gemma-3 and the real 270M."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_layers import assert_real_tokens_close
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from lyra.backends.protocol import StaticLayer
from lyra.checkpoint import resolve
from lyra.conformance.oracles.hf import HuggingFaceOracle
from lyra.conformance.oracles.hf_real import RealLayer, load_model, real_layers
from lyra.errors import CheckpointError
from lyra.spec import HeadSplit, InputError

ORACLE = HuggingFaceOracle()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Gemma-3 with two global layers, saved as a folder."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=3,
        query_pre_attn_scalar=11,
        initializer_range=0.3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    model = Gemma3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("gemma")
    model.save_pretrained(folder)
    return folder


def model_outputs(model: Gemma3ForCausalLM, layer: int, ids: list[int]) -> np.ndarray:
    """What the model's own self-attention returns in a layer, [1,T,E]."""
    outputs = []
    attention = model.model.layers[layer].self_attn
    handle = attention.register_forward_hook(lambda _module, _args, output: outputs.append(output[0].detach().numpy()))
    model(input_ids=torch.tensor([ids]))
    handle.remove()
    return outputs[0]


@pytest.mark.parametrize("layers", [None, (0, 1, 2, 3)])
def test_the_oracle_reproduces_a_whole_model_layer_by_layer(checkpoint: Path, layers: tuple[int, ...] | None) -> None:
    ids = [2, 7, 49, 0, 13, 7, 31]
    real = real_layers(checkpoint, ids, layers)
    assert [layer.index for layer in real] == list(layers or (1, 3))
    for layer in real:
        assert layer.spec.scale == 11**-0.5
        assert layer.spec.sliding_window == (3 if layer.index % 2 == 0 else None)
        want = model_outputs(load_model(str(checkpoint)), layer.index, ids)
        every = np.ones((1, len(ids)), dtype=bool)
        composed = ORACLE.attention(layer.spec, layer.weights)(layer.x, positions=layer.positions).output
        assert_real_tokens_close(composed, want, every, atol=1e-5)
        assert_real_tokens_close(
            ORACLE.plain(layer.spec, layer.weights, layer.x, layer.positions), want, every, atol=1e-5
        )
        assert np.abs(want).max() > 0.1


def test_real_layers_refuses_what_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        real_layers(tmp_path, [2])
    with pytest.raises(InputError, match=r"layers \[4\] do not exist"):
        real_layers(checkpoint, [2], [4])
    with pytest.raises(InputError, match="ids is empty"):
        real_layers(checkpoint, [])
    with pytest.raises(InputError, match=r"ids \[50\] are no tokens"):
        real_layers(checkpoint, [2, 50])
    shutil.copytree(checkpoint, tmp_path / "part")
    tensors = load_file(tmp_path / "part" / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_norm.weight"]
    save_file(tensors, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights .*: \['model\.layers\.1\.self_attn\.k_norm\.weight'\]"):
        real_layers(tmp_path / "part", [2])
    assert not load_model(str(checkpoint)).model.layers[1].self_attn._forward_pre_hooks


def assert_past_as_context_equals_plain(layer: RealLayer, start: int) -> None:
    """A layer whose heads all go to Lyra, with the tokens before `start` as context, is the plain layer after them."""
    spec = layer.spec.replace(split=HeadSplit.all(layer.spec))
    w = {name: value.astype(np.float64) for name, value in layer.weights.items()}
    past = layer.x[:, :start].astype(np.float64)
    shape = (1, start, spec.num_key_value_heads, spec.head_dim)
    k = (past @ w["k_proj.weight"].T).reshape(shape).swapaxes(1, 2)
    v = (past @ w["v_proj.weight"].T).reshape(shape).swapaxes(1, 2)
    k = k / np.sqrt(np.mean(k * k, axis=-1, keepdims=True) + spec.qk_norm.eps) * (1 + w["k_norm.weight"])
    static = StaticLayer(
        k.astype(np.float32), v.astype(np.float32), np.ones((1, start), dtype=bool), np.arange(start)[None]
    )
    live = layer.positions[:, : layer.x.shape[1] - start]
    got = ORACLE.attention(spec, layer.weights)(layer.x[:, start:], positions=live, static=static).output
    want = ORACLE.plain(layer.spec, layer.weights, layer.x, layer.positions)[:, start:]
    assert_real_tokens_close(got, want, np.ones(live.shape, dtype=bool), atol=1e-5 * np.abs(want).max())
    blind = ORACLE.attention(spec, layer.weights)(layer.x[:, start:], positions=live).output
    assert np.abs(blind - want).max() > 0.01 * np.abs(want).max()


def test_the_past_as_context_equals_the_plain_layer(checkpoint: Path) -> None:
    for layer in real_layers(checkpoint, [2, 7, 49, 0, 13, 7, 31]):
        assert_past_as_context_equals_plain(layer, start=3)


def test_real_weights_of_the_270m() -> None:
    try:
        folder = resolve("gemma-3-270m")
    except CheckpointError as reason:
        pytest.skip(str(reason))
    ids = [2, *range(1000, 9000, 300)]
    layers = real_layers(folder, ids)
    assert [layer.index for layer in layers] == [5, 11, 17]
    for layer in layers:
        want = model_outputs(load_model(str(folder)), layer.index, ids)
        got = ORACLE.attention(layer.spec, layer.weights)(layer.x, positions=layer.positions).output
        assert_real_tokens_close(got, want, np.ones((1, len(ids)), dtype=bool), atol=1e-5)
        assert_past_as_context_equals_plain(layer, start=10)
