"""output_attentions: Hugging Face's weights without a context; with one, those over its slots and the live tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny_gemma import CUT, GLOBAL, LAYERS, left_padding, make_model, random_context, random_ids
from torch.nn.functional import pad

from lyra import Model
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.backends.torch_impl.model import TorchEngine
from lyra.spec import HeadSplit, InputError

pytestmark = pytest.mark.usefixtures("one_thread")

IDS, SLOTS = torch.tensor(random_ids(2, 11)), 6


@pytest.fixture
def model() -> Any:
    """A tiny model whose layers give their weights."""
    return make_model(attn_implementation="eager")


def looked(model: Any, **options: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=IDS, **options)


def test_without_a_context_hugging_faces_own_attention_gives_its_own(model: Any) -> None:
    plain, injector = looked(model, output_attentions=True), GemmaInjector(model)
    model.config.attention_dropout = 0.5  # which the modules, made before, do not hear of
    with injector.enable(split=CUT):
        found = looked(model, output_attentions=True)
        assert len(found.attentions) == LAYERS
        assert torch.equal(found.logits, plain.logits)
        assert all(torch.equal(*pair) for pair in zip(found.attentions, plain.attentions, strict=True))
        looked(model.train())
    model.set_attn_implementation("sdpa")
    with injector.enable(split=CUT):
        assert looked(model, output_attentions=True).attentions == ()  # as in transformers, which warns


def test_so_does_its_dropout() -> None:
    model = make_model(attention_dropout=0.5).train()
    found = []
    for split in (None, HeadSplit.half(GemmaInjector(model).spec)):
        if split is not None:
            GemmaInjector(model).enable(split=split)
        torch.manual_seed(0)
        found.append(looked(model).logits)
    assert torch.equal(*found)
    assert not torch.equal(found[0], looked(model.eval()).logits)


@pytest.mark.parametrize("given", ["one row", "a row for each", "hidden slots"])
def test_with_a_context_they_are_over_its_slots_and_the_live_tokens(model: Any, given: str) -> None:
    injector, front = GemmaInjector(model), Model(TorchEngine(model, GemmaInjector(model).spec))
    context = random_context(injector, (0, 1))
    if given == "a row for each":
        context = context.stack([context, random_context(injector, (0, 1), seed=4)])
    if given == "hidden slots":
        context = replace(context, mask=np.array([[False, True, True, False, True, True]]))
    mask = left_padding(2, 11)
    places = torch.tensor(mask.cumsum(axis=1) - 1).clamp_min(0)
    call = {"attention_mask": torch.tensor(mask.astype(int)), "position_ids": places}
    plain = looked(model, **call, output_attentions=True).attentions
    front.attach(context, CUT)
    expected = front.attentions(IDS.numpy(), mask)
    unasked = looked(model, **call).logits
    asked = looked(model, **call, output_attentions=True)
    assert torch.equal(asked.logits, unasked)
    real = torch.tensor(mask)[:, None, :, None]
    for layer, weights in enumerate(asked.attentions):
        if layer in GLOBAL:
            assert weights.shape == (2, 4, 11, SLOTS + 11)
            np.testing.assert_allclose(torch.where(real, weights, 0.0), expected[layer], rtol=0, atol=1e-5)
            assert not weights[:, 0, :, :SLOTS].any()  # the vanilla head
        else:
            assert weights.shape == plain[layer].shape
    assert torch.equal(asked.attentions[0], plain[0])
    model.config.output_attentions = True
    again = looked(model, **call).attentions
    assert all(torch.equal(*pair) for pair in zip(again, asked.attentions, strict=True))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_while_generating(model: Any, cache: str) -> None:
    injector = GemmaInjector(model)
    injector.enable(random_context(injector, (0, 1)), CUT)
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": cache, "pad_token_id": 0}
    made = model.generate(IDS, **options, output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(made.sequences, model.generate(IDS, **options))
    with torch.inference_mode():
        whole = model(input_ids=made.sequences[:, :-1], output_attentions=True).attentions[GLOBAL[0]]
    rows = torch.cat([pad(step[GLOBAL[0]], (0, 13))[..., : SLOTS + 13] for step in made.attentions], dim=2)
    torch.testing.assert_close(rows, whole, rtol=0, atol=1e-5)
    assert [step[GLOBAL[0]].shape[2] for step in made.attentions] == [11, 1, 1]


def test_hooks_belong_to_the_place(model: Any) -> None:
    seen: list[str] = []
    place, injector = model.model.layers[GLOBAL[0]], GemmaInjector(model)
    with injector.enable(random_context(injector, (0, 1)), CUT):
        assert len(looked(model, output_attentions=True).attentions) == LAYERS  # transformers hooks the modules once
        place.self_attn.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        looked(model)
    assert len(looked(model, output_attentions=True).attentions) == LAYERS
    handle = place.self_attn.register_forward_pre_hook(lambda *_: seen.append("before"))
    with injector.enable(split=CUT):
        assert len(looked(model, output_attentions=True).attentions) == LAYERS
        handle.remove()
        looked(model)
    kinds = ["LyraGemma3Attention", "Gemma3Attention", "before", "LyraGemma3Attention", "LyraGemma3Attention"]
    assert seen == kinds


def test_in_fewer_bits_and_while_a_context_is_tuned(model: Any) -> None:
    injector = GemmaInjector(model)
    context = random_context(injector, (0, 1))
    expected = looked(injector.enable(context, CUT).model, output_attentions=True).attentions[GLOBAL[0]]
    injector.enable(context, CUT, trainable=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = looked(model, output_attentions=True).attentions[GLOBAL[0]]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 0.1
    injector.enable(context, CUT)
    model.bfloat16()
    rounded = looked(model, output_attentions=True).attentions[GLOBAL[0]]
    assert rounded.dtype == torch.bfloat16
    assert (rounded - expected).abs().max() < 0.2


def test_refusals(model: Any) -> None:
    injector = GemmaInjector(model)
    context = random_context(injector, (0, 1))
    injector.enable(context, CUT)
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match=r"call model\.set_attn_implementation\('eager'\) first"):
        looked(model, output_attentions=True)
    model.config._attn_implementation = "flex_attention"  # as set_attn_implementation does, in a model with a context
    with pytest.raises(InputError, match="attn_implementation is 'flex_attention'; expected one of sdpa, eager"):
        injector.enabled[GLOBAL[0]](torch.zeros(1, 1, 32), torch.ones(2, 1, 1, 16))
    model.set_attn_implementation("eager")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        injector.enable(context, CUT, group=dist.group.WORLD)
        with pytest.raises(InputError, match="enable it without a group"):
            looked(model, output_attentions=True)
    finally:
        dist.destroy_process_group()
