"""ModelSpec: the presets, configs of every age, and splits that differ per layer."""

from __future__ import annotations

from typing import Any

import pytest

from lyra.spec import (
    HeadSplit,
    LayerSplit,
    ModelSpec,
    QKNormSpec,
    RopeSpec,
    SpecError,
    StaticSpec,
    load_spec,
    presets,
)

GEMMA = {
    # Q heads, KV heads, head_dim, hidden, layers, window, RoPE factor of global layers, query_pre_attn_scalar
    "gemma-3-270m": (4, 1, 256, 640, 18, 512, 1.0, 256),
    "gemma-3-1b": (4, 1, 256, 1152, 26, 512, 1.0, 256),
    "gemma-3-4b": (8, 4, 256, 2560, 34, 1024, 8.0, 256),
    "gemma-3-12b": (16, 8, 256, 3840, 48, 1024, 8.0, 256),
    "gemma-3-27b": (32, 16, 128, 5376, 62, 1024, 8.0, 168),
}


@pytest.mark.parametrize("name", GEMMA)
def test_presets_have_the_shapes_of_gemma_3(name: str) -> None:
    query_heads, kv_heads, head_dim, hidden, depth, window, factor, scalar = GEMMA[name]
    spec = ModelSpec.preset(name)
    for one in (spec.attention, spec.sliding):
        assert one is not None
        assert (one.num_attention_heads, one.num_key_value_heads) == (query_heads, kv_heads)
        assert (one.head_dim, one.hidden_size) == (head_dim, hidden)
        assert one.scale == scalar**-0.5
        assert one.qk_norm == QKNormSpec(eps=1e-6)
        assert one.softcap is None
    assert spec.name == name
    assert spec.num_hidden_layers == depth
    assert spec.global_layers == tuple(range(5, depth, 6))
    assert spec.attention.rope == RopeSpec(theta=1e6, factor=factor)
    assert spec.sliding is not None
    assert spec.sliding.rope == RopeSpec(theta=1e4)
    assert (spec.attention.sliding_window, spec.sliding.sliding_window) == (None, window)


def test_every_preset_survives_its_texts() -> None:
    assert set(GEMMA) < set(presets())
    for name in presets():
        spec = ModelSpec.preset(name)
        assert load_spec(name) == spec
        assert ModelSpec.from_toml(spec.to_toml()) == ModelSpec.from_json(spec.to_json()) == spec
        assert hash(ModelSpec.from_toml(spec.to_toml())) == hash(spec)
    with pytest.raises(SpecError, match=r"unknown preset 'gemma'; known: gemma-3-12b"):
        ModelSpec.preset("gemma")


def config_of(name: str, style: str) -> dict[str, Any]:
    """A preset's config.json as Hugging Face writes it: before transformers 5, since, or within a multimodal one."""
    query_heads, kv_heads, head_dim, hidden, depth, window, factor, scalar = GEMMA[name]
    spec = ModelSpec.preset(name)
    config: dict[str, Any] = {
        "model_type": "gemma3_text",
        "vocab_size": spec.vocab_size,
        "intermediate_size": spec.intermediate_size,
        "hidden_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": query_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }
    linear = {"rope_type": "linear", "factor": factor} if factor > 1 else None
    if style == "new":
        kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(depth)]
        full = {"rope_theta": 1e6, "rope_type": "default"} | (linear or {})
        sliding = {"rope_theta": 1e4, "rope_type": "default"}
        return config | {
            "layer_types": kinds,
            "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        }
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": linear, "sliding_window_pattern": 6}
    if style == "multimodal":
        return {
            "model_type": "gemma3",
            "text_config": {key: value for key, value in config.items() if key != "model_type"},
        }
    return config


@pytest.mark.parametrize("style", ["old", "new", "multimodal"])
@pytest.mark.parametrize("name", GEMMA)
def test_a_config_gives_the_preset(name: str, style: str) -> None:
    assert ModelSpec.from_hf_config(config_of(name, style), name=name) == ModelSpec.preset(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"layer_types": ["chunked_attention"]}, "unknown layer_types ['chunked_attention']"),
        ({"num_attention_heads": 6}, "hidden_size is 2560; expected a multiple of num_attention_heads (6)"),
        ({"num_key_value_heads": 3}, "is not a multiple"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; expected num_hidden_layers, 34"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected 1 to 4,096"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; expected a number up to"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0; expected 1 or more"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"head_dim": None}, "head_dim is None; expected an integer"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected a number"),
        ({"rope_parameters": {"full_attention": [1]}}, "rope_parameters.full_attention is [1]; expected a table"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_type is 'linear' and there is no factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0; expected a number above 0"),
        ({"rope_theta": 10**400}, "rope_theta is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config is set"),
    ],
)
def test_what_the_spec_does_not_have_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_hf_config(config_of("gemma-3-4b", "old") | change)
    assert words in str(caught.value)


def test_splits_may_differ_per_layer() -> None:
    model = ModelSpec.preset("gemma-3-4b")
    first, second = model.global_layers[:2]
    two, one = HeadSplit.last_kv(model, 2), HeadSplit.last_kv(model, 1)
    same = model.with_split(two, StaticSpec(live="self"))
    assert {same.layer(index).split for index in same.global_layers} == {two}
    assert same.layer(first).static.live == "self"
    assert same.layer(0) == model.sliding
    own = same.with_split({first: one, second: two})
    assert [own.layer(index).lyra_kv_heads for index in own.global_layers[:3]] == [(3,), (2, 3), ()]
    assert own.layer(first).static.live == "self"
    assert ModelSpec.from_toml(own.to_toml()) == own
    assert own.with_split(None).layer(first).split is None
    with pytest.raises(SpecError, match=r"splits name layers \[0\], which are not global"):
        model.replace(splits=(LayerSplit(0, two),))
    with pytest.raises(SpecError, match="no query heads"):
        model.with_split({first: HeadSplit((8,))})
    with pytest.raises(SpecError, match="there is no layer 99; it has layers 0 to 33"):
        model.layer(99)
