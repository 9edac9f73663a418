"""LyraGemma3Attention by itself, and GemmaInjector, which puts it into a loaded model and takes it out again."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from tiny_gemma import CONFIG, GLOBAL, LAYERS, make_model, random_context, random_ids
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from lyra.backends.torch_impl import LyraGemma3Attention
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.spec import ContextError, HeadSplit, InputError, ModelSpec, SpecError
from lyra.spec.model import presets

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True}
SPLITS = {
    "last half": HeadSplit((4, 5, 6, 7)),
    "first": HeadSplit((0, 1)),
    "scattered": HeadSplit((0, 1, 4, 5)),
    "vanilla scattered": HeadSplit((2, 3)),
    "cut": HeadSplit((1, 6), share_kv=True),
    "none": HeadSplit.none(),
    "all": HeadSplit(tuple(range(8))),
}


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor(random_ids(2, 11))).logits


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) and got[name].dtype == expected[name].dtype for name in got)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("bias", [False, True])
def test_weights_go_both_ways_bit_for_bit(split, bias):
    config = Gemma3TextConfig(**(CONFIG | HEADS | {"attention_bias": bias}))
    original = Gemma3Attention(config, 1)
    for value in original.parameters():
        torch.nn.init.normal_(value)
    before = bits(original)
    module = LyraGemma3Attention(config, 1, split=split)
    module.load_weights_from_original(original)
    lyra, dim = module.spec.lyra_kv_heads, module.head_dim
    for name in ("k_proj", "v_proj"):
        rows = before[f"{name}.weight"].unflatten(0, (4, dim))
        assert torch.equal(getattr(module, f"lyra_{name}").weight, rows[list(lyra)].flatten(0, 1))
        vanilla = [head for head in range(4) if head not in lyra]
        assert torch.equal(getattr(module, f"vanilla_{name}").weight, rows[vanilla].flatten(0, 1))
    assert_same_bits(bits(module), before)
    assert module.to_original() is original
    assert_same_bits(bits(original), before)

    alone = LyraGemma3Attention(config, 1, split=split)
    alone.load_state_dict(before)
    made = alone.to_original()
    assert type(made) is Gemma3Attention
    assert_same_bits(bits(made), before)


def test_rows_that_stand_side_by_side_are_not_copied():
    config = Gemma3TextConfig(**(CONFIG | HEADS))
    original = Gemma3Attention(config, 1)
    module = LyraGemma3Attention.around(original, LyraGemma3Attention(config, 1, split=SPLITS["last half"]).spec)
    own = {value.untyped_storage().data_ptr() for value in module.parameters()}
    assert own == {value.untyped_storage().data_ptr() for value in original.parameters()}
    assert module.q_proj is original.q_proj
    assert module.k_norm is original.k_norm


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_without_a_context_the_model_is_what_it_was(split):
    model = make_model(**HEADS)
    plain, before, modules = logits(model), bits(model), [layer.self_attn for layer in model.model.layers]
    with GemmaInjector(model).enable(split=split) as injector:
        assert tuple(injector.enabled) == (GLOBAL if split.lyra_q_heads else ())
        torch.testing.assert_close(logits(model), plain, rtol=0, atol=2e-5 * plain.abs().max().item())
        assert_same_bits(bits(model), before)
    assert [layer.self_attn for layer in model.model.layers] == modules
    assert_same_bits(bits(model), before)
    assert torch.equal(logits(model), plain)


def test_enabling_replaces_and_disabling_restores_whichever_injector_does_it():
    model = make_model(**HEADS)
    plain, modules = logits(model), [layer.self_attn for layer in model.model.layers]
    first = GemmaInjector(model)
    context, other = (random_context(first, (0, 1, 2, 3), seed=seed) for seed in (1, 2))
    first.enable(context, SPLITS["scattered"])
    one = logits(model)
    assert (one - plain).abs().max() > 1e-2
    second = GemmaInjector(model)
    kept = second.enabled[GLOBAL[0]]
    second.enable(other, SPLITS["scattered"], live="self")
    two = logits(model)
    assert second.enabled[GLOBAL[0]] is kept
    assert first.context() is second.context() is other
    second.enable(other, SPLITS["last half"])
    assert second.enabled[GLOBAL[0]] is not kept
    second.enable(context, SPLITS["scattered"])
    assert torch.equal(logits(model), one)
    second.enable(other, SPLITS["scattered"], live="self")
    assert torch.equal(logits(model), two)
    first.disable()
    assert second.enabled == {}
    assert [layer.self_attn for layer in model.model.layers] == modules
    assert torch.equal(logits(model), plain)
    assert len(modules) == LAYERS


def test_a_projection_that_is_more_than_a_linear_layer_stays_whole():
    model = make_model(**HEADS)
    injector = GemmaInjector(model)
    context = random_context(injector, (0, 1, 2, 3))
    with injector.enable(context, SPLITS["cut"]):
        expected = logits(model)
    calls = []
    projection = model.model.layers[GLOBAL[0]].self_attn.k_proj
    projection.register_forward_hook(lambda *_: calls.append(1))
    with injector.enable(context, SPLITS["cut"]):
        module = injector.enabled[GLOBAL[0]]
        assert module.whole
        assert module.k_proj is projection
        assert not injector.enabled[GLOBAL[1]].whole
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5 * expected.abs().max().item())
        assert calls == [1]
        keys = module.k_proj = torch.nn.Sequential(projection)
        other = injector.enabled[GLOBAL[1]]
        queries = other.q_proj = torch.nn.Sequential(other.q_proj)
    assert model.model.layers[GLOBAL[0]].self_attn.k_proj is keys
    assert model.model.layers[GLOBAL[1]].self_attn.q_proj is queries


def test_a_model_whose_weights_are_offloaded():
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    context = GemmaInjector(model).capture(random_ids(1, 12, seed=4))
    with GemmaInjector(model).enable(context):
        expected = logits(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.layers[GLOBAL[0]].self_attn.k_proj.weight.is_meta
    injector = GemmaInjector(model)
    found = injector.capture(random_ids(1, 12, seed=4))
    assert found.fingerprint == context.fingerprint
    with injector.enable(found):
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=2e-5 * expected.abs().max().item())
    assert model.model.layers[GLOBAL[0]].self_attn.k_proj.weight.is_meta


def test_what_is_tuned_while_enabled_stays_tuned():
    model = make_model(**HEADS)
    before = bits(model)
    for name in ("last half", "scattered"):
        with GemmaInjector(model).enable(split=SPLITS[name]) as injector, torch.no_grad():
            module = injector.enabled[GLOBAL[0]]
            heads = list(module.spec.lyra_kv_heads)
            module.lyra_v_proj.weight += 1
        changed = model.model.layers[GLOBAL[0]].self_attn.v_proj.weight.detach().unflatten(0, (4, -1))
        old = before[f"model.layers.{GLOBAL[0]}.self_attn.v_proj.weight"].unflatten(0, (4, -1))
        assert torch.equal(changed[heads], old[heads] + 1)
        rest = [head for head in range(4) if head not in heads]
        assert torch.equal(changed[rest], old[rest])
        model.load_state_dict(before)


def test_only_the_lyra_heads_projections_can_be_trained():
    model = make_model(**HEADS).requires_grad_(False)
    with GemmaInjector(model).enable(split=SPLITS["last half"]) as injector:
        module = injector.enabled[GLOBAL[0]]
        module.lyra_k_proj.weight.requires_grad_(True)
        ids = torch.tensor(random_ids(1, 7))
        model(input_ids=ids, labels=ids).loss.backward()
        assert module.lyra_k_proj.weight.grad.abs().max() > 0
        assert [name for name, value in model.named_parameters() if value.grad is not None] == [
            f"model.layers.{GLOBAL[0]}.self_attn.lyra_k_proj.weight"
        ]


def test_a_wrapped_part_is_neither_cut_anew_nor_put_back():
    model = make_model(**HEADS)
    injector = GemmaInjector(model).enable(split=SPLITS["last half"])
    context = random_context(injector, (2, 3))
    module = injector.enabled[GLOBAL[1]]
    plain, module.lyra_k_proj = module.lyra_k_proj, torch.nn.Sequential(module.lyra_k_proj)
    expected, first = logits(model), injector.enabled[GLOBAL[0]]
    with pytest.raises(InputError, match=r"has become a torch.nn.*Sequential.*merge or unload the adapter"):
        injector.disable()
    with pytest.raises(InputError, match="merge or unload the adapter first"):
        injector.enable(split=SPLITS["first"])
    assert injector.enabled == {GLOBAL[0]: first, GLOBAL[1]: module}
    injector.enable(context, SPLITS["last half"], override=True)
    assert isinstance(module.lyra_k_proj, torch.nn.Sequential)
    assert (logits(model) - expected).abs().max() > 1e-2
    module.lyra_k_proj = plain
    injector.disable()
    assert injector.enabled == {}


@pytest.mark.parametrize("name", ["last half", "scattered"])
def test_an_enabled_model_may_be_moved_and_copied(name):
    model = make_model(**HEADS)
    expected = bits(copy.deepcopy(model).bfloat16())
    injector = GemmaInjector(model)
    injector.enable(random_context(injector, (0, 1, 2, 3)), SPLITS[name])
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    model.bfloat16()
    assert injector.enabled[GLOBAL[0]].static_k.dtype == torch.bfloat16
    for one in (model, twin.bfloat16()):
        GemmaInjector(one).disable()
        assert_same_bits(bits(one), expected)
        assert all(value.dtype == torch.bfloat16 for value in one.parameters())


def test_training_and_evaluating_go_with_the_model():
    model = make_model(attention_dropout=0.1)
    injector = GemmaInjector(model)
    with injector.enable(random_context(injector, (1,))):
        assert not any(part.training for part in injector.enabled[GLOBAL[0]].modules())
        with pytest.raises(InputError, match=r"attention_dropout=0\.1 while training"):
            model.train()(input_ids=torch.tensor(random_ids(1, 4)))
    assert all(part.training for part in model.modules())


def test_state_dicts_are_hugging_faces_while_enabled():
    model, other = make_model(**HEADS), make_model(seed=1, **HEADS)
    injector = GemmaInjector(other)
    with injector.enable(random_context(injector, (0, 1, 2, 3)), SPLITS["cut"]):
        other.load_state_dict(bits(model))
        assert_same_bits(bits(other), bits(model))
    assert torch.equal(logits(other), logits(model))


SIZES = {
    "4b": {"num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256},
    "27b": {"num_attention_heads": 32, "num_key_value_heads": 16, "query_pre_attn_scalar": 168},
}
FACTOR_8 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize("name", [name for name in presets() if re.fullmatch(r"gemma-3-\d+[mb]", name)])
def test_every_size_is_cut_as_its_preset_says(name):
    known = ModelSpec.preset(name).attention
    config = Gemma3TextConfig(
        hidden_size=known.hidden_size, num_attention_heads=known.num_attention_heads, head_dim=known.head_dim,
        num_key_value_heads=known.num_key_value_heads, query_pre_attn_scalar=round(known.scale**-2),
        rope_parameters=FACTOR_8 if known.rope.factor > 1 else None, num_hidden_layers=6,
    )  # fmt: skip
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    original = model.model.layers[5].self_attn
    with GemmaInjector(model).enable() as injector:
        assert injector.spec.attention == known
        module = injector.enabled[5]
        assert module.scaling == known.scale
        rows = len(HeadSplit.half(known).lyra_kv_heads) * known.head_dim
        assert module.lyra_k_proj.weight.shape == (rows, known.hidden_size)
        assert module.vanilla_v_proj.weight.shape == (original.v_proj.out_features - rows, known.hidden_size)
    assert model.model.layers[5].self_attn is original


@pytest.mark.parametrize("size", SIZES)
def test_scale_and_rope_factor_of_the_larger_models(size):
    """Where all heads are Lyra's and there is one layer, a captured context is a prefix: Hugging Face says what of."""
    model = make_model(
        **SIZES[size], rope_parameters=FACTOR_8, num_hidden_layers=1, layer_types=["full_attention"], hidden_size=64
    )
    injector = GemmaInjector(model)
    assert injector.spec.attention.scale == SIZES[size]["query_pre_attn_scalar"] ** -0.5
    assert injector.spec.attention.rope.factor == 8.0
    prefix, ids = random_ids(1, 40, seed=5), random_ids(1, 9)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(np.concatenate((prefix, ids), axis=1))).logits[:, 40:]
        with injector.enable(injector.capture(prefix), HeadSplit.all(injector.spec)):
            found = model(input_ids=torch.tensor(ids)).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def multimodal() -> Gemma3ForConditionalGeneration:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=CONFIG, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config).eval()


def test_models_of_every_kind_with_the_same_text_model():
    model = make_model()
    injector = GemmaInjector(model)
    context = injector.capture(random_ids(1, 12, seed=4))
    whole = multimodal()
    whole.model.language_model.load_state_dict(model.model.state_dict())
    ids = torch.tensor(random_ids(2, 9))
    with torch.inference_mode():
        with injector.enable(context):
            expected = model.model(input_ids=ids).last_hidden_state
        for other in (whole, whole.model, whole.model.language_model):
            with GemmaInjector(other).enable(context) as enabled:
                assert tuple(enabled.enabled) == GLOBAL
                found = other(input_ids=ids, output_hidden_states=True).hidden_states[-1]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    for layer, kept in injector.capture(random_ids(1, 12, seed=4)).layers.items():
        np.testing.assert_array_equal(kept.k, context.layers[layer].k)


def test_images_are_attended_to_as_before():
    """Tokens of an image see each other in both directions: the model's own mask says so."""
    model = multimodal()
    torch.manual_seed(3)
    ids = torch.tensor([[2, 5, 91, 90, 90, 90, 90, 92, 7, 8]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (ids == 90).long()}
    injector = GemmaInjector(model)
    with torch.inference_mode():
        expected = model(**inputs).logits
        causal = model(**(inputs | {"token_type_ids": None})).logits
        made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with injector.enable(split=HeadSplit.all(injector.spec)):
            found = model(**inputs).logits
            assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), made)
    assert (expected - causal).abs().max() > 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * expected.abs().max().item() + 1e-6)


def test_the_cache_and_the_angles_of_a_context():
    model = make_model()
    injector = GemmaInjector(model)
    context = injector.capture(random_ids(1, 12, seed=4))
    module = injector.enable(context).enabled[GLOBAL[0]]
    k, v = module.lyra_kv_cache
    cos, sin = module.lyra_position_embeddings
    stored = context.static_layer(GLOBAL[0], (1,))
    one, two = torch.tensor(stored.k).chunk(2, dim=-1)
    turned = torch.tensor(stored.k) * cos[:, None] + torch.cat((-two, one), dim=-1) * sin[:, None]
    torch.testing.assert_close(k, turned)
    assert torch.equal(v, torch.tensor(stored.v))
    assert "lyra_q_heads=[2, 3], context of 12 tokens" in repr(model)
    injector.enable(split=HeadSplit.half(injector.spec))
    assert module.lyra_kv_cache is None
    assert module.lyra_position_embeddings is None


def test_refusals():
    model = make_model()
    injector = GemmaInjector(model)
    context = random_context(injector, (1,))
    with pytest.raises(ContextError, match=r"does not fit.*projections or k_norm of layers"):
        GemmaInjector(make_model(seed=1)).enable(context)
    with pytest.raises(ContextError, match=r"holds KV heads \(1,\) of layer"):
        injector.enable(context, HeadSplit((0, 1)))
    with pytest.raises(SpecError, match="cuts a GQA group"):
        injector.enable(split=HeadSplit((0,)))
    with pytest.raises(SpecError, match="sliding-window layer"):
        LyraGemma3Attention(model.config, 0)
    assert injector.enabled == {}
    injector.enable(context)
    with pytest.raises(InputError, match="plain one"):
        injector.capture(random_ids(1, 4))
    with pytest.raises(InputError, match="no context enabled"):
        injector.enable(split=HeadSplit.half(injector.spec)).context()
    with pytest.raises(InputError, match="give its to_original"):
        injector.enabled[GLOBAL[0]].load_weights_from_original(injector.enabled[GLOBAL[0]])
    with pytest.raises(InputError, match="a Linear holds 0 Gemma3TextModels"):
        GemmaInjector(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="attn_implementation is 'flex_attention'"):
        GemmaInjector(make_model(attn_implementation="flex_attention"))
