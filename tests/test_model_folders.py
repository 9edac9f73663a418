"""Model folders: one strictness, the same in both backends and in the same words, before either sees a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from model_damage import WEIGHTS, copied, joined_weights, replaced, split_weights, write_fields
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

import lyra
from lyra.backends.checkpoint import open_checkpoint
from lyra.backends.checkpoint.safetensors_file import SCANNED_AT_ONCE, read_table
from lyra.errors import CheckpointError
from lyra.spec import ModelSpec
from lyra.text import Text

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

from transformers import Gemma3ForCausalLM  # noqa: E402

from lyra.backends.jax_impl.decoder import empty_model_cache  # noqa: E402
from lyra.backends.torch_impl import GemmaInjector  # noqa: E402

FRAMEWORKS = ("torch", "jax")
Tensors = dict[str, np.ndarray]


def with_config(**fields: Any) -> Callable[[Path], None]:
    """Fields of config.json that hold another value."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        write_fields(folder / "config.json", config | fields)

    return change


def with_tensors(change: Callable[[Tensors], Tensors], **fields: Any) -> Callable[[Path], None]:
    """Other weights, and other fields beside them."""

    def made(folder: Path) -> None:
        tensors = change(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).unlink()
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        with_config(**fields)(folder)

    return made


def with_file(name: str, data: bytes | dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: replaced(folder / name, data if isinstance(data, bytes) else json.dumps(data).encode())


def sharded(places: Callable[[dict[str, str]], dict[str, Any]]) -> Callable[[Path], None]:
    """The weights in two files and an index, whose weight_map is changed."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        right = {name: file for file, part in halves.items() for name in part}
        write_fields(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places(right)})

    return change


def last_layer(tensors: Tensors) -> Tensors:
    """The tensors with a fifth layer, a copy of the fourth."""
    fourth = {name: value for name, value in tensors.items() if "layers.3" in name}
    return tensors | {name.replace("layers.3", "layers.4"): value for name, value in fourth.items()}


def with_biases(tensors: Tensors) -> Tensors:
    names = [name for name in tensors if "self_attn" in name and name.endswith("_proj.weight")]
    return tensors | {name.replace("weight", "bias"): np.ones(len(tensors[name]), np.float32) for name in names}


def with_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": -tensors["model.embed_tokens.weight"]}


def with_value(value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = value
        return tensors

    return change


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a layer more than the config has": (with_tensors(last_layer), "layers.4.* has no place in the model"),
    "a layer fewer": (with_config(num_hidden_layers=5), "13 tensors that config.json asks for are missing"),
    "layers that are counted and listed differently": (
        with_config(layer_types=["full_attention"] * 3),
        "config.json: layer_types has 3 entries; expected num_hidden_layers, 4",
    ),
    "biases that the config does not have": (with_tensors(with_biases), r"_proj\.bias' has no place"),
    "biases that are missing": (with_config(attention_bias=True), "16 tensors .* are missing, .*q_proj.bias"),
    "a head of its own that the config ties": (with_tensors(with_head), "'lm_head.weight' is not the embedding"),
    "a head that is missing": (with_config(tie_word_embeddings=False), "1 tensors .* are missing, among them lm_head"),
    "a head's bias": (
        with_tensors(lambda tensors: tensors | {"lm_head.bias": np.ones(4, np.float32)}),
        "'lm_head.bias' has no place",
    ),
    "NaN in a weight": (with_tensors(with_value(np.nan)), r"down_proj\.weight' holds NaN or infinity"),
    "infinity in a weight": (with_tensors(with_value(-np.inf)), r"down_proj\.weight' holds NaN or infinity"),
    "other widths": (with_config(intermediate_size=95), r"mlp.*has shape .*; config.json says"),
    "a window of nothing": (with_config(sliding_window=0), "config.json: sliding_window"),
    "a scalar of 0": (with_config(query_pre_attn_scalar=0), "query_pre_attn_scalar is 0; expected 1 or more"),
    "a window of 10⁴⁰": (with_config(sliding_window=10**40), "sliding_window is 1000.*; expected a number up to"),
    "10⁹ layers": (with_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; expected 1 to 4,096"),
    "a vocabulary of 10⁹": (with_config(vocab_size=10**9), r"embed_tokens.*; config.json says \(1000000000"),
    "an activation that no backend has": (with_config(hidden_activation="gelu_new"), "hidden_activation is 'gelu_new'"),
    "a softcap that one backend would ignore": (with_config(attn_logit_softcapping=50.0), "softcapping is 50"),
    "quantised weights": (with_config(quantization_config={"bits": 4}), "quantization_config is set"),
    "a string for a number": (with_config(rms_norm_eps="1e-6"), "rms_norm_eps is '1e-6'; expected a number"),
    "padding outside the vocabulary": (with_config(pad_token_id=5000), "pad_token_id is 5000; expected ids"),
    "an end outside it": (
        with_file("generation_config.json", {"eos_token_id": [1, 5000]}),
        r"generation_config.json: eos_token_id is \[1, 5000\]; expected ids",
    ),
    "tables without end": (with_file("config.json", b'{"a":' * 100_000), "config.json' nests .*; expected JSON"),
    "no UTF-8": (with_file("config.json", b"\xff\xfe{}"), "config.json' is not UTF-8 text"),
    "a list": (with_file("generation_config.json", b"[1]"), "generation_config.json' holds a list"),
    "an index to elsewhere": (
        sharded(lambda places: places | {"model.norm.weight": "../../model.safetensors"}),
        "weight_map puts 'model.norm.weight' into '../../model.safetensors'; expected the name of a file in",
    ),
    "an index to a pickle": (
        sharded(lambda places: places | {"model.norm.weight": "pytorch_model.bin"}),
        "into 'pytorch_model.bin'; expected a .safetensors file: no other kind is read",
    ),
    "an index to nothing": (
        sharded(lambda places: places | {"model.norm.weight": "gone.safetensors"}),
        "gone.safetensors is missing; it is named in model.safetensors.index.json",
    ),
    "an index to the wrong file": (
        sharded(lambda places: dict.fromkeys(places, "model-00001-of-00002.safetensors")),
        "into model-00001-of-00002.safetensors, which does not hold it",
    ),
    "weights under another name": (
        lambda folder: (folder / WEIGHTS).rename(folder / "weights.safetensors") and None,
        "has neither model.safetensors nor .*, only weights.safetensors",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_both_backends_refuse_a_folder_in_the_same_words(case: str, tiny_folder: Path, tmp_path: Path) -> None:
    change, words = REFUSED[case]
    folder = copied(tiny_folder, tmp_path / "model")
    change(folder)
    said = []
    for backend in FRAMEWORKS:
        with pytest.raises(CheckpointError, match=words) as refusal:
            lyra.load(folder, backend=backend)
        said.append(str(refusal.value))
    assert said[0] == said[1]
    assert str(folder) in said[0]
    assert "\n" not in said[0]


def test_a_pickle_is_never_read(tiny_folder: Path, tmp_path: Path) -> None:
    """Neither alone, nor beside the weights."""
    folder, trace = copied(tiny_folder, tmp_path / "model"), tmp_path / "unpickled"
    code = f"cos\nsystem\n(S'touch {trace}'\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (folder / name).write_bytes(code)
    for backend in FRAMEWORKS:
        lyra.load(folder, backend=backend)
    (folder / WEIGHTS).unlink()
    for backend in FRAMEWORKS:
        with pytest.raises(CheckpointError, match=r"it holds .*pytorch_model\.bin.*: pickles may run code"):
            lyra.load(folder, backend=backend)
    assert not trace.exists()


def same_weights(folder: Path, other: Path) -> None:
    """Both backends load the same attention weights from both folders, and torch's model computes the same."""
    for backend in FRAMEWORKS:
        one, two = (lyra.load(path, backend=backend) for path in (folder, other))
        for layer in range(one.spec.num_hidden_layers):
            first, second = (model.engine.attention_weights(layer) for model in (one, two))
            for name in first.keys() | second.keys():
                np.testing.assert_array_equal(first[name], second[name])
        if backend == "torch":
            np.testing.assert_array_equal(one.logits([2, 5, 7]), two.logits([2, 5, 7]))


def test_what_else_lies_in_a_folder_is_not_the_model(tiny_folder: Path, tmp_path: Path) -> None:
    """A context, an adapter, another format's copy beside the weights; an index beside the one file."""
    folder = copied(tiny_folder, tmp_path / "model")
    lyra.load(tiny_folder).capture("an and the").save(folder / "book.safetensors")
    save_file({"x": np.ones(3, np.float32)}, folder / "adapter_model.safetensors")
    write_fields(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "nobody/nothing"})
    (folder / "consolidated.safetensors").write_bytes(b"cut short")
    write_fields(folder / "model.safetensors.index.json", {"weight_map": {"model.norm.weight": "gone.safetensors"}})
    same_weights(folder, tiny_folder)


@pytest.mark.parametrize(
    "change",
    [
        sharded(lambda places: places),
        with_tensors(lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}),
        with_tensors(lambda tensors: {name.removeprefix("model."): value for name, value in tensors.items()}),
    ],
    ids=["in two files", "with a copy of the embedding as head", "saved from the decoder alone"],
)
def test_odd_folders_that_are_the_model(change: Callable[[Path], None], tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path / "model")
    change(folder)
    same_weights(folder, tiny_folder)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "language_model."])
def test_the_text_model_of_a_multimodal_folder(prefix: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Of every age; what sees pictures is left alone, whatever it holds, but does not belong to a text model."""
    folder = copied(tiny_folder, tmp_path / "model")
    vision = {
        "vision_tower.x.position_ids": np.arange(3),
        "model.multi_modal_projector.y": np.full(2, np.nan, np.float32),
    }
    with_tensors(lambda tensors: {name.replace("model.", prefix, 1): tensors[name] for name in tensors} | vision)(
        folder
    )
    with pytest.raises(CheckpointError, match=r"(vision_tower|multi_modal_projector).* has no place in the model"):
        lyra.load(folder)
    config = json.loads((folder / "config.json").read_text())
    write_fields(folder / "config.json", {"model_type": "gemma3", "text_config": config, "eos_token_id": [1, 9]})
    same_weights(folder, tiny_folder)
    text = lyra.load(folder).text
    assert text is not None
    assert text.stops == (1, 9)


def test_a_folder_that_transformers_saved_of_a_multimodal_model(tmp_path: Path) -> None:
    """With an untied head, which only the outer config tells of."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    text = sizes | {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 40}
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=39, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    expected = model(torch.tensor([[2, 5, 7]])).logits.detach().numpy()
    for backend in FRAMEWORKS:
        loaded = lyra.load(tmp_path, backend=backend)
        assert not loaded.spec.tie_word_embeddings
        np.testing.assert_allclose(loaded.logits([2, 5, 7])[None], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_header_of_odd_length_leaves_the_weights_unaligned(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path / "model")
    header, body = split_weights((folder / WEIGHTS).read_bytes())
    longer = (header | {"__metadata__": {"pad": "x" * length}} for length in range(4))
    replaced(folder / WEIGHTS, next(data for one in longer if (len(data := joined_weights(one, body)) - len(body)) % 4))
    assert all(tensor.start % 4 for tensor in open_checkpoint(folder).tensors.values())
    same_weights(folder, tiny_folder)


ROPES: dict[str, dict[str, Any]] = {
    "thetas left out": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_type": "default"},
        }
    },
    "thetas at top level": {
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {}},
        "rope_theta": 5e5,
        "rope_local_base_freq": 3e4,
    },
    "flat": {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}},
    "none for a kind": {"rope_parameters": {"full_attention": {"rope_theta": 2e5, "rope_type": "default"}}},
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_by_hand_is_transformers_rope_in_both_backends(case: str, tiny_folder: Path, tmp_path: Path) -> None:
    """And a context of an injector, which asks transformers' own config, is taken."""
    folder = copied(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    old = ("rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters")
    fields = {name: value for name, value in config.items() if name not in old} | ROPES[case]
    write_fields(folder / "config.json", fields)
    theirs = Gemma3ForCausalLM.from_pretrained(folder)
    ids = [[2, *range(5, 45)]]
    expected = theirs(torch.tensor(ids)).logits.detach().numpy()
    injector = GemmaInjector(theirs)
    context = injector.capture([ids[0][:8]])
    for backend in FRAMEWORKS:
        model = lyra.load(folder, backend=backend)
        assert (model.spec.attention, model.spec.sliding) == (injector.spec.attention, injector.spec.sliding)
        if backend == "torch" or case == "thetas left out":  # compiling one of them shows that JAX goes by its spec
            np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
        model.attach(context)


def test_a_window_wider_than_any_text_costs_no_memory(tiny_folder: Path, tmp_path: Path) -> None:
    """The live cache has room for the tokens that come, not for the window."""
    folder = copied(tiny_folder, tmp_path / "model")
    with_config(sliding_window=10**9)(folder)
    spec = open_checkpoint(folder).spec
    assert {layer.mask.shape for layer in empty_model_cache(spec, 1, 700, np.dtype(np.float32)).layers} == {(1, 1024)}


@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_every_end_that_a_folder_names_ends_a_text(backend: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path / "model")
    with_config(eos_token_id=[1, 7])(folder)
    write_fields(folder / "generation_config.json", {"eos_token_id": 8})
    write_fields(folder / "tokenizer_config.json", {"eos_token": {"content": "<unk>"}})
    write_fields(folder / "special_tokens_map.json", {"eos_token": "<note>"})
    ends = lyra.load(folder, backend=backend).text.stops
    assert ends == (1, 3, 7, 8, 278)


def test_the_spec_of_a_model_names_every_weight_of_it(tiny_folder: Path) -> None:
    spec = ModelSpec.from_hf_config(json.loads((tiny_folder / "config.json").read_text()))
    assert spec.weight_shapes() == {name: value.shape for name, value in load_file(tiny_folder / WEIGHTS).items()}
    own = spec.replace(tie_word_embeddings=False).weight_shapes()
    assert own["lm_head.weight"] == (spec.vocab_size, spec.hidden_size)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_only_what_is_not_finite_is_refused(dtype: str, tmp_path: Path) -> None:
    """Also the largest numbers of a type, whose sum is infinite, and where only the last of many values is bad."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    largest = np.full((SCANNED_AT_ONCE + 5, 1), ml_dtypes.finfo(kind).max, kind)
    for last in (1.0, -np.inf, np.nan):
        largest[-1] = last
        save_file({"x": largest}, tmp_path / WEIGHTS)
        (tensor,) = read_table(tmp_path / WEIGHTS)
        if np.isfinite(last):
            np.testing.assert_array_equal(tensor.array(), largest)
        else:
            with pytest.raises(CheckpointError, match="'x' holds NaN or infinity"):
                tensor.array()


def test_a_tokenizer_file_that_cuts_or_fills_texts_does_neither_here(tiny_folder: Path, tmp_path: Path) -> None:
    """A file keeps what its last user set."""
    folder = copied(tiny_folder, tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=12)
    (folder / "tokenizer.json").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    plain, found = Text.from_folder(tiny_folder), Text.from_folder(folder)
    assert plain is not None
    assert found is not None
    assert found.encode("and the end of a note") == plain.encode("and the end of a note")
    assert found.encode("a") == plain.encode("a")


def test_a_tokenizer_whose_parts_contradict_each_other_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """Where the library panics, when it reads the file or at the first text."""
    for case, change in enumerate(("post_processor", "merges")):
        folder = copied(tiny_folder, tmp_path / str(case))
        fields = json.loads((folder / "tokenizer.json").read_text())
        if change == "merges":
            fields["model"]["merges"][4][1] = "<eos>"
        else:
            fields["post_processor"]["single"][0]["SpecialToken"]["id"] = "nothing"
        write_fields(folder / "tokenizer.json", fields)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
            lyra.load(folder)
