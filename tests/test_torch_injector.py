"""LyraGemma3Attention by itself, and GemmaInjector, which puts it into a loaded model and takes it out again."""

from __future__ import annotations

import pytest
import torch
from tiny_gemma import CONFIG, GLOBAL, LAYERS, make_model, random_context, random_ids
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention

from lyra.backends.torch_impl.gemma3 import LyraGemma3Attention
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.spec import HeadSplit

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
