"""The seam for model families: what is a family's own stands in its module, and old files mean what they meant."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lyra.backends.checkpoint import open_checkpoint
from lyra.checkpoint import resolve
from lyra.errors import CheckpointError
from lyra.gguf_convert import family_of
from lyra.gguf_parts import GGUFModel
from lyra.spec import InputError, ModelSpec, SequentialSpec, SpecError, families, load_spec, presets
from lyra.spec.attaching import blocks_by_layer
from lyra.spec.attention import StaticSpec
from lyra.spec.families import FAMILIES, LayerNorms, family, family_of_config
from lyra.spec.families.gemma3 import GEMMA3

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "name": "small", "vocab_size": 7, "intermediate_size": 6, "pattern": ("global",),
    "attention": {"hidden_size": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "scale": 1.0},
}  # fmt: skip


def test_a_spec_that_names_no_family_is_a_gemma_and_stays_as_it_was_written() -> None:
    """Files older than the field keep loading, and are written without it."""
    old = ModelSpec.from_dict(SMALL)
    assert old.family == "gemma3"
    assert families.of(old) is GEMMA3
    assert old == ModelSpec.from_dict({**SMALL, "family": "gemma3"})
    assert "family" not in old.to_dict()
    assert ModelSpec.from_json(json.dumps(old.to_dict())) == old


@pytest.mark.parametrize("name", presets())
def test_presets_say_whether_lyra_runs_them(name: str) -> None:
    spec = load_spec(name)
    assert isinstance(spec, ModelSpec)
    assert (spec.family == "gemma3") == name.startswith("gemma-3")
    if spec.family is None:
        with pytest.raises(
            SpecError, match=rf"{name} is described by its spec only; the models Lyra runs are .*Gemma-3"
        ):
            spec.weight_shapes()
        with pytest.raises(CheckpointError, match=r"for studies and splits; the models Lyra runs are .*Gemma-3"):
            resolve(name)
    elif name != "gemma-3-270m":
        example = family(spec.family).hub_id.format(name)
        with pytest.raises(CheckpointError, match=rf"hub id such as '{example}'; only 'gemma-3-270m' can be"):
            resolve(name)
    assert load_spec("gpt2").family is None
    assert family("gemma3").hub_id.format("gemma-3-1b") == "google/gemma-3-1b-pt"


def test_the_documentation_lists_every_family() -> None:
    table = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8").partition("## Families of models")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", table.partition("\n## ")[0], re.MULTILINE))
    assert list(rows) == list(FAMILIES)
    for name, known in FAMILIES.items():
        written = [*known.model_types, *([] if known.gguf is None else [known.gguf.architecture])]
        assert set(re.findall(r"`(\w+)`", rows[name])) == set(written), name


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SpecError, match=r"'rwkv' is no family; known: gemma3.*, or 'none' for a model that is only"):
        ModelSpec.from_dict({**SMALL, "family": "rwkv"})
    with pytest.raises(SpecError, match="unknown family 'rwkv'; known: gemma3"):
        family("rwkv")
    assert ModelSpec.from_dict({**SMALL, "family": "none"}).family is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "rwkv"},
            "model_type is 'rwkv'; this reads .*'gemma3'.* and '.*: give a model of .*Gemma-3",
        ),
        ({}, "model_type is None; this reads"),
        ({"model_type": ["gemma3_text"]}, r"model_type is \['gemma3_text'\]; this reads"),
        ({"model_type": "gemma3", "text_config": 5}, "text_config is 5; expected a table of fields"),
        (
            {"model_type": "llava", "text_config": {"model_type": "rwkv"}},
            "model_type is 'llava', that of text_config 'rwkv'; this reads 'gemma3' with a text_config of 'gemma3_te",
        ),
    ],
)
def test_a_config_of_no_known_family_is_refused_by_its_model_type(config: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        family_of_config(config)
    with pytest.raises(SpecError, match=words):
        ModelSpec.from_hf_config(config)


def test_folders_and_files_of_other_families_are_refused(tmp_path: Path, tiny_gguf: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    with pytest.raises(CheckpointError, match=r"of type 'rwkv'; Lyra reads .*gemma3_text.*: give a model of"):
        open_checkpoint(tmp_path)
    file = GGUFModel(tiny_gguf)
    assert family_of(file)[0] is GEMMA3
    file.metadata["general.architecture"] = "rwkv7"
    with pytest.raises(CheckpointError, match=r"architecture 'rwkv7'; Lyra reads .*'gemma3'"):
        family_of(file)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.lm_head.weight", "model.lm_head.weight"),
    ],
)
def test_names_in_files_of_every_age(stored: str, name: str) -> None:
    assert GEMMA3.text_name(stored) == name


def test_a_layer_without_outer_norms_gives_them_neither_to_a_model_nor_to_a_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in Llama, where a norm called post_attention_layernorm stands before the feed-forward part."""
    plain = replace(GEMMA3, name="plain", norms=LayerNorms("input_layernorm", None, "post_attention_layernorm", None))
    monkeypatch.setattr(families, "FAMILIES", {**FAMILIES, "plain": plain})
    spec = ModelSpec.from_dict({**SMALL, "family": "plain"})
    names = [name for name in spec.weight_shapes() if name.endswith("layernorm.weight")]
    assert names == [f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")]
    (block,) = blocks_by_layer(spec, {0: (0,)}, None, StaticSpec(), 0.0, True).values()
    assert not block.output_norm
    assert blocks_by_layer(ModelSpec.from_dict(SMALL), {0: (0,)}, None, StaticSpec(), 0.0, True)[0].output_norm
    layer = {name.removeprefix("model.layers.0."): None for name in spec.weight_shapes()}
    assert set(block.weights_of(layer, "plain")) == set(block.weight_shapes())
    with pytest.raises(SpecError, match="unknown family 'olmo'"):
        SequentialSpec.for_layer(spec.attention).weights_of(layer, "olmo")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("package", ["lyra.backends.torch_impl", "lyra.backends.jax_impl", "lyra.conformance.oracles"])
def test_every_family_has_its_module_in_each_backend_and_among_the_oracles(package: str, name: str) -> None:
    assert find_spec(f"{package}.families.{name}") is not None


@pytest.mark.parametrize(("backend", "title"), [("torch", "PyTorch"), ("jax", "JAX")])
def test_a_family_that_a_backend_does_not_run_is_refused(
    backend: str, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"torch": "transformers", "jax": "flax"}[backend])
    theirs = import_module(f"lyra.backends.{backend}_impl.families")
    monkeypatch.setattr(families, "FAMILIES", {**FAMILIES, "plain": replace(GEMMA3, name="plain")})
    with pytest.raises(InputError, match=f"the {title} backend does not run models of the family 'plain'"):
        theirs.of(ModelSpec.from_dict({**SMALL, "family": "plain"}))
    with pytest.raises(SpecError, match="described by its spec only"):
        theirs.of(ModelSpec.from_dict({**SMALL, "family": "none"}))
    assert theirs.of(ModelSpec.from_dict(SMALL)).name == "gemma3"


@pytest.mark.parametrize(
    "folder",
    ["api", "backends/checkpoint", "backends/jax_impl", "backends/torch_impl", "conformance/oracles", "spec"],
)
def test_nothing_but_a_familys_modules_names_it(folder: str) -> None:
    """Names and patterns of a family's own stand in its module alone; a package's door lists what it gives."""
    own = re.compile(r"gemma3|Gemma3|(?:input|post_attention|pre_feedforward|post_feedforward)_layernorm|vision_tower")
    paths = [path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]
    found = {path.name: own.findall(_without_documentation(path.read_text(encoding="utf-8"))) for path in paths}
    assert len(paths) > 3
    assert not {name: words for name, words in found.items() if words}


def _without_documentation(code: str) -> str:
    return re.sub(r'""".*?"""|#.*', "", code, flags=re.DOTALL)
