"""Models of several .gguf files, what a file says of its ends, and that nothing is kept which does not load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import write_tiny_gguf

import lyra
from lyra.backends.checkpoint import open_checkpoint
from lyra.checkpoint import resolve
from lyra.errors import CheckpointError
from lyra.gguf_convert import check_tensors, hf_config
from lyra.gguf_parts import GGUFModel, parts_of
from lyra.gguf_tokenizer import build_tokenizer
from lyra.text import Text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LYRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkpoints"


@pytest.fixture(scope="session")
def split_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """The model of `tiny_gguf` in three files."""
    folder = tmp_path_factory.mktemp("parts")
    write_tiny_gguf(folder / "tiny.gguf", tensors_each=20)
    return tuple(sorted(folder.iterdir()))


def copied(parts: tuple[Path, ...], folder: Path) -> list[Path]:
    folder.mkdir()
    return [Path(shutil.copy(part, folder)) for part in parts]


def test_all_parts_are_read_whichever_is_named(split_model: tuple[Path, ...], tiny_gguf: Path, cache: Path) -> None:
    assert [part.name for part in split_model] == [f"tiny-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    whole = dict(open_checkpoint(resolve(tiny_gguf)).arrays())
    folders = {resolve(part) for part in split_model}
    assert len(folders) == 1, "converted once"
    found = dict(open_checkpoint(folders.pop()).arrays())
    assert found.keys() == whole.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, whole[name])


def test_a_part_without_the_others_says_so_and_nothing_is_kept(
    split_model: tuple[Path, ...], tmp_path: Path, cache: Path
) -> None:
    first, second, third = copied(split_model, tmp_path / "model")
    third.unlink()
    for part in (first, second):
        with pytest.raises(
            CheckpointError, match=r"is one of 3 parts, and 1 are missing beside it: tiny-00003-of-00003"
        ):
            resolve(part)
    alone = first.rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed\.gguf is one of 3 parts of a split model; expected a name"):
        resolve(alone)
    assert not cache.exists() or list(cache.iterdir()) == []


def test_parts_of_different_models_are_refused(split_model: tuple[Path, ...], tmp_path: Path, cache: Path) -> None:
    first, second, third = copied(split_model, tmp_path / "model")
    shutil.copy(second, third)
    with pytest.raises(
        CheckpointError, match=r"00003-of-00003\.gguf: split\.no is 1 and split\.count 3; expected 2 and 3"
    ):
        resolve(first)
    with pytest.raises(CheckpointError, match="is called part 0 of 3"):
        parts_of(tmp_path / "tiny-00000-of-00003.gguf")
    assert list(cache.iterdir()) == []


def test_a_file_that_does_not_convert_names_itself_and_is_not_kept(
    tiny_gguf: Path, tmp_path: Path, cache: Path
) -> None:
    """Weights that are not finite show last, when all else has been written."""
    path, data = tmp_path / "diverged.gguf", bytearray(tiny_gguf.read_bytes())
    info = next(tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors if tensor.name == "output_norm.weight")
    data[info.data_offset : info.data_offset + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"diverged\.gguf: tensor 'output_norm\.weight' holds NaN or infinity"):
        resolve(path)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["lost", "cut", "config"])
def test_a_kept_conversion_that_is_damaged_is_made_again(tiny_gguf: Path, cache: Path, damage: str) -> None:
    folder = resolve(tiny_gguf)
    weights, before = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    if damage == "lost":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(before[:-7])
    else:
        (folder / "config.json").write_text("{}")
    assert resolve(tiny_gguf) == folder
    assert weights.read_bytes() == before
    assert [item.name for item in cache.iterdir()] == [folder.name]


@pytest.mark.parametrize(
    ("controls", "metadata", "stops"),
    [
        (("<start_of_turn>", "<end_of_turn>"), {}, (1, 280)),
        (("<|im_start|>", "<|im_end|>"), {}, (1, 280)),
        (("<done>",), {"eot_token_id": 279}, (1, 279)),
        (("<done>",), {"eom_token_id": 279}, (1, 279)),
        (("<start_of_turn>",), {}, (1,)),
    ],
)
def test_every_end_that_a_file_names_ends_a_text(
    tmp_path: Path, controls: tuple[str, ...], metadata: dict[str, int], stops: tuple[int, ...]
) -> None:
    pytest.importorskip("torch")
    model = lyra.load(write_tiny_gguf(tmp_path / "chat.gguf", controls=controls, **metadata))
    assert model.text is not None
    assert model.text.stops == stops
    assert model.module.generation_config.eos_token_id == (stops[0] if len(stops) == 1 else list(stops))
    assert model.text.decode([265, stops[-1], 265]) == "e"


def test_a_folder_whose_files_forget_the_end_of_a_turn_stops_at_it(tmp_path: Path) -> None:
    """Its tokenizer has a special token that is spelled so; a word of a text that is spelled so is none."""
    folder = resolve(write_tiny_gguf(tmp_path / "chat.gguf", controls=("<end_of_turn>",)))
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((folder / name).read_text())
        assert fields["eos_token_id"] == [1, 279]
        (folder / name).write_text(json.dumps(fields | {"eos_token_id": 1}))
    assert Text.from_folder(folder).stops == (1, 279)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["content"] != "<end_of_turn>"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Text.from_folder(folder).stops == (1,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"gemma3.attention.head_count": 0},
            r"gemma3\.attention\.head_count is 0; expected a whole number of 1 or more",
        ),
        ({"gemma3.attention.head_count_kv": np.array([2, 2, 1, 2])}, r"head_count_kv is array"),
        ({"gemma3.attention.layer_norm_rms_epsilon": "x"}, r"rms_epsilon is 'x'; expected a number above 0"),
        ({"gemma3.attention.sliding_window_pattern": np.array([True, False])}, "for each of 4 layers"),
        ({"gemma3.rope.scaling.type": "linear"}, r"lacks the metadata gemma3\.rope\.scaling\.factor"),
        ({"gemma3.attention.value_length": 64}, "value_length is not attention.key_length, 32"),
        ({"general.architecture": "gemma2"}, "architecture 'gemma2'"),
        ({"general.architecture": np.array([1, 2])}, r"architecture array\(\[1, 2\]\)"),
        ({"gemma3.rope.scaling.type": np.array([1, 2])}, "scaling.type is array"),
        ({"tokenizer.ggml.model": np.array([1, 2])}, "no SentencePiece vocabulary"),
        ({"tokenizer.ggml.token_type": 3}, "token_type is 3; expected one kind for each of 279 tokens"),
        ({"tokenizer.ggml.tokens": ["a", 5]}, "expected a list of texts"),
        ({"tokenizer.ggml.bos_token_id": 279}, "bos_token_id is 279; expected an id from 0 to 278"),
        ({"tokenizer.ggml.eot_token_id": "x"}, "eot_token_id is 'x'"),
    ],
)
def test_metadata_that_describe_no_model_are_refused(tiny_gguf: Path, changes: dict[str, Any], words: str) -> None:
    file = GGUFModel(tiny_gguf)
    file.metadata |= changes
    with pytest.raises(CheckpointError, match=words) as refusal:
        hf_config(file)
    assert str(tiny_gguf) in str(refusal.value)


def test_metadata_of_any_kind_are_refused_in_a_line_or_make_a_model(tiny_gguf: Path) -> None:
    """Every field in turn, with a value of another kind."""
    file = GGUFModel(tiny_gguf)
    right = dict(file.metadata)
    more = ("rope.scaling.type", "final_logit_softcapping", "rope.freq_base_swa", "attention.value_length")
    for key in (*right, *(f"gemma3.{name}" for name in more), "tokenizer.ggml.eot_token_id", "tokenizer.chat_template"):
        for value in (np.array([1, 2]), np.empty(0, bool), "x", -1, 2**63, float("nan"), ["a", ["b"]], False):
            file.metadata = right | {key: value}
            refusal = ""
            try:
                config = hf_config(file)
                check_tensors(file, config)
                build_tokenizer(file)
            except CheckpointError as error:
                refusal = str(error)
            assert refusal == "" or str(tiny_gguf) in refusal, key
            assert "\n" not in refusal, key


def test_a_pattern_may_be_listed_layer_by_layer(tmp_path: Path) -> None:
    """As newer converters write it, with true for the layers that slide."""
    path = write_tiny_gguf(tmp_path / "listed.gguf", pattern=[True, False, False, True])
    assert open_checkpoint(resolve(path)).spec.pattern == ("sliding", "global", "global", "sliding")
