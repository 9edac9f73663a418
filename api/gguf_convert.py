"""A Gemma-3 .gguf file as a folder in Hugging Face's layout: config.json, model.safetensors, tokenizer.json.

Weights become float32, one block of rows at a time, so a conversion needs little memory whatever the model's size.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .gguf_file import GGUFFile
from .gguf_tokenizer import build_tokenizer, tokenizer_config
from .progress import Steps

CONVERTER_VERSION = 1
"""Part of a converted folder's name: raise it whenever the same file would convert to something else."""

MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}

LAYERS_OF_27B = 62
"""The one Gemma-3 size whose scale is not head_dim ** -0.5; a .gguf file does not say so."""


def convert(path: Path, folder: Path, progress: Steps | None = None) -> None:
    """Write `folder` (which exists, empty) from the .gguf file. Raises CheckpointError for another architecture."""
    file = GGUFFile(path)
    report = progress or _silent
    config = hf_config(file)
    report("tokenizer", 0, len(file.tensors))
    build_tokenizer(file.metadata).save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", tokenizer_config(file.metadata))
    _write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    _write_json(folder / "config.json", config)
    write_weights(file, folder / "model.safetensors", report)


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json of a Gemma-3 file. Raises CheckpointError, naming what is missing."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if architecture != "gemma3":
        raise CheckpointError(f"{file.path} holds the architecture {architecture!r}; Lyra reads 'gemma3'")

    def field(key: str) -> Any:
        if f"gemma3.{key}" not in metadata:
            raise CheckpointError(f"{file.path} lacks the metadata gemma3.{key}; convert or download it again")
        return metadata[f"gemma3.{key}"]

    def optional(key: str, default: Any) -> Any:
        return metadata.get(f"gemma3.{key}", default)

    hidden, heads, layers = field("embedding_length"), field("attention.head_count"), field("block_count")
    head_dim = field("attention.key_length")
    return {
        "_name_or_path": _model_name(file),
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "float32",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv"),
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": field("context_length"),
        "rms_norm_eps": _shortest(field("attention.layer_norm_rms_epsilon")),
        "query_pre_attn_scalar": hidden // heads if layers == LAYERS_OF_27B else head_dim,
        "sliding_window": field("attention.sliding_window"),
        "sliding_window_pattern": optional("attention.sliding_window_pattern", 6),
        "rope_theta": _shortest(optional("rope.freq_base", 1_000_000.0)),
        "rope_local_base_freq": _shortest(optional("rope.freq_base_swa", 10_000.0)),
        "rope_scaling": _rope_scaling(metadata),
        "attention_bias": False,
        "attn_logit_softcapping": optional("attn_logit_softcapping", None),
        "final_logit_softcapping": optional("final_logit_softcapping", None),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", 2),
        "eos_token_id": _end_tokens(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id", 0),
    }


def hf_name(name: str) -> str:
    """Hugging Face's name of a Gemma-3 tensor. Raises CheckpointError for a tensor that Gemma-3 does not have."""
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found is None or found[2] not in LAYER_TENSORS:
        raise CheckpointError(f"tensor {name!r} belongs to no Gemma-3 text model")
    return f"model.layers.{found[1]}.{LAYER_TENSORS[found[2]]}.weight"


def write_weights(file: GGUFFile, path: Path, report: Steps) -> None:
    """All tensors as float32 in one safetensors file. Norm weights are stored there as 1 + w, here as w."""
    order = sorted(file.tensors, key=hf_name)
    header, offset = {}, 0
    for name in order:
        shape = file.tensors[name].shape
        size = 4 * prod(shape)
        header[hf_name(name)] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for done, name in enumerate(order):
            report(name, done, len(order))
            for block in file.blocks(name):
                target.write((block - 1 if name.endswith("norm.weight") else block).data)
    report("done", len(order), len(order))


def _model_name(file: GGUFFile) -> str:
    name = file.metadata.get("general.name") or file.path.stem
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def _shortest(value: float) -> float:
    """The decimal that was meant: 1e-06 and not the nearest float32's 9.999999974752427e-07."""
    return float(f"{value:.7g}")


def _rope_scaling(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = metadata.get("gemma3.rope.scaling.type", "none")
    if kind == "none":
        return None
    return {"rope_type": kind, "factor": _shortest(metadata["gemma3.rope.scaling.factor"])}


def _end_tokens(metadata: Mapping[str, Any]) -> int | list[int]:
    """EOS, and the end of a turn where the file has one (instruction-tuned models)."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ends = sorted({metadata[key] for key in keys if key in metadata}) or [1]
    return ends[0] if len(ends) == 1 else ends


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _silent(what: str, done: int, total: int) -> None:
    """No report."""
