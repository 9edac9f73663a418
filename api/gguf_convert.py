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

import numpy as np

from lyra.spec.errors import SpecError
from lyra.spec.model import ModelSpec

from .errors import CheckpointError
from .gguf_parts import GGUFModel
from .gguf_tokenizer import build_tokenizer, check_vocabulary, control_ends, tokenizer_config
from .progress import Steps

CONVERTER_VERSION = 2
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

PATTERN = "attention.sliding_window_pattern"
LAYERS_OF_27B = 62
"""The one Gemma-3 size whose scale is not head_dim ** -0.5; a .gguf file does not say so."""


def convert(path: Path, folder: Path, progress: Steps | None = None) -> None:
    """Write `folder` (which exists, empty) from the .gguf file, all of its parts if it is split.

    Raises CheckpointError for another architecture, and where metadata or tensors are not those of one model; then
    nothing has been written.
    """
    file = GGUFModel(path)
    report = progress or _silent
    config = hf_config(file)
    check_tensors(file, config)
    report("tokenizer", 0, len(file.tensors))
    tokenizer = build_tokenizer(file)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "tokenizer_config.json", tokenizer_config(file.metadata))
    _write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    _write_json(folder / "config.json", config)
    write_weights(file, folder / "model.safetensors", report)


def hf_config(file: GGUFModel) -> dict[str, Any]:
    """The config.json of a Gemma-3 file. Raises CheckpointError, naming what is missing or wrong."""
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture != "gemma3":
        raise CheckpointError(f"{file.path} holds the architecture {architecture!r:.100}; Lyra reads 'gemma3'")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor token_embd.weight; it is incomplete: download it again")
    check_vocabulary(file)
    fields = Fields(file.path, metadata)
    hidden, heads, layers = (fields.whole(key) for key in ("embedding_length", "attention.head_count", "block_count"))
    head_dim = fields.whole("attention.key_length")
    if fields.whole("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: gemma3.attention.value_length is not attention.key_length, {head_dim}")
    kinds = fields.layer_types(layers)
    return {
        "_name_or_path": _model_name(file),
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "float32",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.whole("attention.head_count_kv"),
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": fields.whole("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "query_pre_attn_scalar": hidden // heads if layers == LAYERS_OF_27B else head_dim,
        "sliding_window": fields.whole("attention.sliding_window"),
        **({"layer_types": kinds} if kinds else {"sliding_window_pattern": fields.whole(PATTERN, 6)}),
        "rope_theta": fields.number("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 10_000.0),
        "rope_scaling": fields.rope_scaling(),
        "attention_bias": False,
        "attn_logit_softcapping": fields.softcap("attn_logit_softcapping"),
        "final_logit_softcapping": fields.softcap("final_logit_softcapping"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id", 2),
        "eos_token_id": _end_tokens(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id", 0),
    }


class Fields:
    """The metadata under `gemma3.`, each of the kind that is asked for. All methods raise CheckpointError."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path, self.metadata = path, metadata

    def whole(self, key: str, default: int | None = None) -> int:
        """A size, 1 or more; a list with one number for all layers is that number."""
        value = self._value(key, default)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if type(value) is not int or value < 1:
            raise self._wrong(key, value, "a whole number of 1 or more")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number above 0: the decimal that was meant, 1e-06 and not the nearest float32's 9.999999974752427e-07."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self._wrong(key, value, "a number above 0")
        return float(f"{value:.7g}")

    def softcap(self, key: str) -> float | None:
        """A softcap, None where there is none."""
        return self.number(key) if f"gemma3.{key}" in self.metadata else None

    def layer_types(self, layers: int) -> list[str] | None:
        """The kind of every layer where the pattern is a list of which ones slide; None where it is a number."""
        value = self._value(PATTERN, 6)
        if not isinstance(value, np.ndarray):
            return None
        if value.dtype != np.bool_ or len(value) != layers:
            raise self._wrong(PATTERN, value.tolist(), f"a number, or true or false for each of {layers} layers")
        return ["sliding_attention" if slides else "full_attention" for slides in value]

    def rope_scaling(self) -> dict[str, Any] | None:
        """The scaling of the global layers' RoPE."""
        kind = self.metadata.get("gemma3.rope.scaling.type", "none")
        if not isinstance(kind, str):
            raise self._wrong("rope.scaling.type", kind, "a word")
        return None if kind == "none" else {"rope_type": kind, "factor": self.number("rope.scaling.factor")}

    def _value(self, key: str, default: Any) -> Any:
        value = self.metadata.get(f"gemma3.{key}", default)
        if value is None:
            raise CheckpointError(f"{self.path} lacks the metadata gemma3.{key}; convert or download it again")
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: gemma3.{key} is {value!r:.100}; expected {expected}")


def check_tensors(file: GGUFModel, config: Mapping[str, Any]) -> None:
    """The tensors are those of the metadata's model, no more, no fewer, none misshapen. Raises CheckpointError."""
    try:
        shapes = ModelSpec.from_hf_config(config).weight_shapes()
        names = {name: hf_name(name) for name in file.tensors}
    except (SpecError, CheckpointError) as refusal:
        text = str(refusal).replace("\n", "; ").replace("ModelSpec.from_hf_config: ", "")
        raise CheckpointError(f"{file.path}: {text}") from None
    for name, info in file.tensors.items():
        if names[name] not in shapes:
            raise CheckpointError(f"{file.path}: tensor {name!r:.100} has no place in a model of its metadata")
        if info.shape != shapes[names[name]]:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has shape {info.shape}; its metadata say {shapes[names[name]]}"
            )
    missing = sorted(set(shapes) - set(names.values()))
    if missing:
        raise CheckpointError(
            f"{file.path}: {len(missing)} tensors of the model are missing, among them {', '.join(missing[:3])}; it is "
            f"incomplete: download it again"
        )


def hf_name(name: str) -> str:
    """Hugging Face's name of a Gemma-3 tensor. Raises CheckpointError for a tensor that Gemma-3 does not have."""
    if name in MODEL_TENSORS:
        return MODEL_TENSORS[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if found is None or found[2] not in LAYER_TENSORS:
        raise CheckpointError(f"tensor {name!r} belongs to no Gemma-3 text model")
    return f"model.layers.{found[1]}.{LAYER_TENSORS[found[2]]}.weight"


def write_weights(file: GGUFModel, path: Path, report: Steps) -> None:
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
                if not np.isfinite(block).all():
                    raise CheckpointError(f"{file.path}: tensor {name!r} holds NaN or infinity; download it again")
                target.write((block - 1 if name.endswith("norm.weight") else block).data)
    report("done", len(order), len(order))


def _model_name(file: GGUFModel) -> str:
    name = file.metadata.get("general.name")
    name = name if isinstance(name, str) and name.strip() else file.path.stem
    return re.sub(r"[\s_]+", "-", name.strip().lower())


def _end_tokens(metadata: Mapping[str, Any]) -> int | list[int]:
    """EOS, and the end of a turn or message, by the file's fields or by the spelling of a control token."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    named = [metadata[key] for key in keys if key in metadata] or [1]
    ends = sorted({*named, *control_ends(metadata)})
    return ends[0] if len(ends) == 1 else ends


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _silent(what: str, done: int, total: int) -> None:
    """No report."""
