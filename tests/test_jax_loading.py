"""Loading checkpoints into JAX: shards, dtypes, multimodal folders, and what is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
pytest.importorskip("flax")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from flax import nnx  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from tiny_gemma import CUT, GLOBAL, assert_close, hf_logits, make_model, random_ids  # noqa: E402

import lyra  # noqa: E402
from lyra.backends.jax_impl import JaxBackend  # noqa: E402
from lyra.backends.jax_impl.decoder import Decoder  # noqa: E402
from lyra.backends.jax_impl.decoder_layer import DecoderLayer  # noqa: E402
from lyra.backends.jax_impl.families.gemma3 import gelu_tanh  # noqa: E402
from lyra.backends.jax_impl.model import JaxEngine  # noqa: E402
from lyra.backends.jax_impl.params import module_path  # noqa: E402
from lyra.backends.jax_impl.saving import save_model, text_config  # noqa: E402
from lyra.backends.jax_impl.sharding import ShardingConfig  # noqa: E402
from lyra.spec import InputError, ModelSpec, StaticSpec  # noqa: E402
from lyra.spec.families.gemma3 import GEMMA3  # noqa: E402
from lyra.spec.inputs import StaticLayer  # noqa: E402


def rewrite(source: Path, target: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Path:
    """A copy of a model's folder with other tensors."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors")
    return target


def test_sharded_bfloat16_and_multimodal_checkpoints(
    gemma_folder: Path, gemma: Any, jax_engine: JaxEngine, tmp_path: Path
) -> None:
    ids = random_ids(1, 6)
    expected = jax_engine.logits(ids)
    sharded, outer, half = tmp_path / "sharded", tmp_path / "outer", tmp_path / "half"
    gemma.save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    np.testing.assert_array_equal(JaxBackend().load(str(sharded)).logits(ids), expected)
    for prefix in ("language_model.model.", "model.language_model."):
        rewrite(
            gemma_folder,
            outer,
            lambda tensors, prefix=prefix: (
                {name.replace("model.", prefix, 1): value for name, value in tensors.items()}
                | {"vision_tower.x.weight": np.zeros(3, np.float32)}
            ),
        )
        config = {"model_type": "gemma3", "text_config": json.loads((gemma_folder / "config.json").read_text())}
        (outer / "config.json").write_text(json.dumps(config))
        np.testing.assert_array_equal(JaxBackend().load(str(outer)).logits(ids), expected)
    make_model().to(torch.bfloat16).save_pretrained(half)
    rounded = transformers.Gemma3ForCausalLM.from_pretrained(half, dtype=torch.float32)
    assert_close(JaxBackend().load(str(half)).logits(ids), hf_logits(rounded, ids))


def test_a_model_computes_in_bfloat16(gemma_folder: Path, jax_engine: JaxEngine) -> None:
    """Parameters, cache and static keys are bfloat16; what goes in and out is float32."""
    engine, ids = JaxBackend().load(str(gemma_folder), dtype="bfloat16"), random_ids(2, 12)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(engine.module))} == {"bfloat16"}
    expected, got = jax_engine.logits(ids), engine.logits(ids)
    assert got.dtype == np.float32
    assert 1e-4 < np.abs(got - expected).max() / np.abs(expected).max() < 0.1
    found = engine.capture(ids[:1], GLOBAL)
    places = np.arange(12)[None]
    static = {layer: StaticLayer(*part, np.ones((1, 12), bool), places) for layer, part in found.items()}
    assert not any((part.view(np.uint32) & 0xFFFF).any() for layer in found.values() for part in layer)
    for model in (engine, jax_engine):
        model.attach(static, dict.fromkeys(GLOBAL, CUT), StaticSpec())
    expected, got = jax_engine.logits(ids), engine.logits(ids)
    assert np.abs(got - expected).max() < 0.1 * np.abs(expected).max()
    assert engine._attached[1].static.keys.dtype == "bfloat16"
    assert engine.generate(ids, max_new_tokens=3).shape == (2, 3)


@pytest.mark.parametrize(("dtype", "shard_bytes"), [("float32", 40_000), ("bfloat16", 1 << 30)])
def test_a_saved_model_is_the_model(
    gemma_folder: Path, gemma: Any, tmp_path: Path, dtype: str, shard_bytes: int
) -> None:
    """Bit for bit in Hugging Face's model and in JAX's, whole and in shards; changed parameters as they are now."""
    engine, ids, target = JaxBackend().load(str(gemma_folder), dtype=dtype), random_ids(1, 6), tmp_path / "saved"
    weight = engine.module.layers[1].mlp.up_proj.weight
    weight[...] = weight[...] * 2
    save_model(engine.module, gemma_folder, target, shard_bytes)
    assert (target / "model.safetensors.index.json").is_file() == (dtype == "float32")
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1  # weights are no more private than their config
    theirs = transformers.Gemma3ForCausalLM.from_pretrained(target, dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    for name, value in gemma.state_dict().items():
        factor = 2 if name == "model.layers.1.mlp.up_proj.weight" else 1
        assert torch.equal(theirs.state_dict()[name], factor * value.to(theirs.dtype)), name
    again = JaxBackend().load(str(target), dtype=dtype)
    np.testing.assert_array_equal(again.logits(ids), engine.logits(ids))
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_saving_keeps_the_tokenizer_and_takes_no_full_folder(tiny_folder: Path, tmp_path: Path) -> None:
    model = lyra.load(tiny_folder, backend="jax")
    model.engine.save(tmp_path / "saved")
    again = lyra.load(tmp_path / "saved", backend="jax")
    assert again.fingerprint() == model.fingerprint()
    assert again.score("the end of a note").mean_nll == model.score("the end of a note").mean_nll
    with pytest.raises(InputError, match="saved is there already"):
        model.engine.save(tmp_path / "saved")


def test_the_text_part_of_a_multimodal_config_is_kept(tmp_path: Path) -> None:
    inner = {"head_dim": 4, "torch_dtype": "x", "tie_word_embeddings": True}  # transformers writes True into every one
    outer = {"model_type": "gemma3", "tie_word_embeddings": False, "text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    assert text_config(tmp_path, "float32") == {
        "architectures": ["Gemma3ForCausalLM"],
        "dtype": "float32",
        "head_dim": 4,
        "model_type": "gemma3_text",
        "tie_word_embeddings": False,
    }


def test_untied_head_softcap_and_linear_rope(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    model = make_model(tie_word_embeddings=False, final_logit_softcapping=3.0, rope_parameters=rope)
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 20)
    assert_close(JaxBackend().load(str(tmp_path)).logits(ids), hf_logits(model, ids))


def test_checkpoints_that_do_not_fit_are_refused(gemma_folder: Path, tmp_path: Path) -> None:
    def load(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
        JaxBackend().load(str(rewrite(gemma_folder, tmp_path / "other", change)))

    q, extra = "model.layers.1.self_attn.q_proj.weight", np.zeros((48, 32), np.float32)
    with pytest.raises(
        InputError,
        match=r"1 tensors .* are missing, among them model\.layers\.1\.self_attn\.q_proj\.weight",
    ):
        load(lambda tensors: {name: value for name, value in tensors.items() if name != q})
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp\.side_proj\.weight' has no place in the model"):
        load(lambda tensors: tensors | {"model.layers.0.mlp.side_proj.weight": extra})
    with pytest.raises(
        InputError,
        match=r"'model\.layers\.9\.mlp\.up_proj\.weight' has no place in the model of config\.json \(4 layers",
    ):
        load(lambda tensors: tensors | {"model.layers.9.mlp.up_proj.weight": extra})
    with pytest.raises(InputError, match=r"are both the model's model\.layers\.0\.mlp\.up_proj\.weight"):
        load(lambda tensors: tensors | {"language_model.model.layers.0.mlp.up_proj.weight": extra})
    with pytest.raises(InputError, match=r"has shape \(3, 32\); config\.json says \(64, 32\)"):
        load(lambda tensors: tensors | {q: np.zeros((3, 32), np.float32)})
    with pytest.raises(InputError, match="dtype is 'int8'"):
        JaxBackend().load(str(gemma_folder), dtype="int8")
    with pytest.raises(InputError, match="device is 'cpu:7'"):
        JaxBackend().load(str(gemma_folder), device="cpu:7")


def test_every_name_has_one_entry(gemma: Any) -> None:
    names = list(gemma.state_dict())
    assert [GEMMA3.text_name(name) for name in names] == names
    assert len({module_path(name) for name in names}) == len(names)
    assert GEMMA3.is_other_part("model.vision_tower.encoder.layers.0.weight")


def test_loads_without_torch_and_transformers(gemma_folder: Path, jax_engine: JaxEngine) -> None:
    ids = random_ids(1, 6)
    code = f"""
        import sys
        for name in ("torch", "transformers", "accelerate"):
            sys.modules[name] = None
        import numpy as np
        from lyra.backends.jax_impl import JaxBackend
        engine = JaxBackend().load({str(gemma_folder)!r})
        print(*engine.generate(np.array({ids.tolist()}), max_new_tokens=4)[0])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(token) for token in jax_engine.generate(ids, max_new_tokens=4)[0]]


@pytest.mark.parametrize(("size", "parameters"), [("270m", 268_098_176), ("1b", 999_885_952)])
def test_presets_have_the_published_number_of_parameters(size: str, parameters: int) -> None:
    """Nothing is allocated: shapes only."""
    spec = ModelSpec.preset(f"gemma-3-{size}")
    shapes = nnx.state(nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0))))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize("size", ["270m", "1b", "4b", "12b", "27b"])
def test_layers_of_every_preset_have_the_shapes_of_its_spec(size: str) -> None:
    spec = ModelSpec.preset(f"gemma-3-{size}")
    index, wide = spec.global_layers[-1], (spec.intermediate_size, spec.hidden_size)
    one_device = ShardingConfig.no_sharding()
    layer = nnx.eval_shape(lambda: DecoderLayer(spec, index, one_device, gelu_tanh, rngs=nnx.Rngs(0)))
    found = {".".join(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(layer))}
    expected = {f"self_attn.{name}": shape for name, shape in spec.layer(index).weight_shapes().items()}
    expected |= {f"mlp.{name}_proj.weight": wide for name in ("gate", "up")} | {"mlp.down_proj.weight": wide[::-1]}
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    expected |= {f"{name}_layernorm.weight": (spec.hidden_size,) for name in norms}
    assert found == expected
