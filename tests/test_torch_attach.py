"""GemmaInjector.inject: blocks behind the attention of a loaded model, from any kind of external cache, or its own."""

from __future__ import annotations

import pytest
import torch
from tiny_gemma import CONFIG, GLOBAL, make_model, random_ids
from transformers import DynamicCache, Gemma3Config, Gemma3ForConditionalGeneration

from lyra.backends.torch_impl import LyraForCausalLM
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.spec import ContextError, HeadSplit, InputError, SpecError

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = random_ids(1, 20, seed=5)


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor(random_ids(2, 11))).logits


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def injector(model):
    made = GemmaInjector(model)
    yield made
    made.withdraw()
    made.disable()


def test_blocks_are_attached_and_detached_by_other_names_too(model, injector):
    """As code written before the names has them: of the injector, and of Lyra's own model."""
    for kind in (GemmaInjector, LyraForCausalLM):
        assert (kind.attach, kind.detach) == (kind.inject, kind.withdraw)
    injector.attach(external_kv_cache=injector.capture(CONTEXT))
    assert tuple(injector.attached) == tuple(injector.injected) == GLOBAL
    injector.detach()
    assert not injector.attached


def test_attached_at_the_start_it_is_the_plain_model(model, injector):
    plain, context = logits(model), injector.capture(CONTEXT)
    for external in (context, None):
        assert injector.inject(external) is injector
        assert tuple(injector.injected) == GLOBAL
        assert torch.equal(logits(model), plain)
        injector.inject(external, gate=0.5)
        assert difference(logits(model), plain) > 0.01
    injector.withdraw()
    assert torch.equal(logits(model), plain)


def test_the_same_context_from_everywhere(model, injector, tmp_path):
    context, cache = injector.capture(CONTEXT), DynamicCache(config=model.config)
    context.save(tmp_path / "book.safetensors")
    with torch.inference_mode():
        model(input_ids=torch.tensor(CONTEXT), past_key_values=cache, use_cache=True)
    found = [logits(injector.inject(one, gate=1.0).model) for one in (context, tmp_path / "book.safetensors", cache)]
    assert torch.equal(found[0], found[1])
    assert difference(found[2], found[0]) < 1e-5


def test_what_is_attached_is_what_was_asked_for(model, injector):
    context, last = injector.capture(CONTEXT), GLOBAL[-1]
    injector.inject(context, gate={last: 0.25}, layers=[last], residual=False, live="self", positions="overlay")
    (block,) = injector.injected.values()
    spec = block.spec
    assert (spec.gate, spec.residual, spec.source) == (0.25, False, "external")
    assert (spec.attention.static.live, spec.attention.static.positions) == ("self", "overlay")
    assert spec.attention.lyra_q_heads == (0, 1, 2, 3)
    injector.inject(context.take([1]), gate=1.0)
    assert {block.spec.attention.lyra_q_heads for block in injector.injected.values()} == {(2, 3)}
    one = logits(model)
    injector.inject(context, gate=1.0, split=HeadSplit((2, 3)))
    assert torch.equal(logits(model), one)
    injector.inject(layers=[0, last], gate=1.0)
    assert {block.spec.source for block in injector.injected.values()} == {"own"}
    assert [block.spec.attention.sliding_window for block in injector.injected.values()] == [
        CONFIG["sliding_window"],
        None,
    ]


def test_parallel_and_sequential_do_not_know_of_each_other(model, injector):
    """A block reads its own context, whatever the layer's attention does; either leaves without the other."""
    plain, context, other = logits(model), injector.capture(CONTEXT), injector.capture(CONTEXT[:, 8:])
    parallel = logits(injector.enable(context).model)
    both = logits(injector.inject(other, gate=1.0, live="causal").model)
    injector.disable()
    sequential = logits(model)
    assert torch.equal(logits(injector.enable(context).model), both)
    injector.withdraw()
    assert torch.equal(logits(model), parallel)
    found = (plain, parallel, sequential, both)
    assert min(difference(a, b) for a in found for b in found if a is not b) > 0.01
    with injector.inject(other):
        pass
    assert not injector.injected
    assert torch.equal(logits(model), plain)


def test_trainable_blocks_have_parameters(model, injector):
    context, before = injector.capture(CONTEXT), set(dict(model.named_parameters()))
    expected = logits(injector.inject(context, gate=1.0).model)
    assert set(dict(model.named_parameters())) == before
    injector.inject(context, gate=1.0, trainable=True)
    added = set(dict(model.named_parameters())) - before
    assert f"model.layers.{GLOBAL[0]}.injected.gate" in added
    assert len(added) == len(GLOBAL) * 9
    assert torch.equal(logits(model), expected)


def test_layers_that_accelerate_has_hooked(model):
    """It puts a forward of its own into modules, and may keep their weights elsewhere between calls."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.hooks import ModelHook, add_hook_to_module

    context = GemmaInjector(model).capture(CONTEXT)
    with GemmaInjector(model).inject(context, gate=1.0, live="causal"):
        expected = logits(model)
    other = make_model()
    plain = logits(other)
    accelerate.cpu_offload(other, execution_device=torch.device("cpu"))
    for layer in other.model.layers:
        add_hook_to_module(layer, ModelHook())
    with GemmaInjector(other).inject(context, gate=1.0, live="causal") as injector:
        assert difference(logits(other), expected) < 1e-5
        with pytest.raises(InputError, match="weights are kept elsewhere"):
            injector.inject(context, trainable=True)
        assert difference(logits(other), expected) < 1e-5
    assert torch.equal(logits(other), plain)
    last = other.model.layers[GLOBAL[1]]
    last.forward = last.forward
    del last._old_forward
    with pytest.raises(InputError, match="layer 3 has a forward of its own"):
        injector.inject(context)
    assert not injector.injected


def test_the_text_part_of_a_multimodal_model():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=CONFIG, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        image_token_index=90, boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).eval()
    injector = GemmaInjector(model)
    ids = torch.tensor(random_ids(1, 11) % 80)
    with torch.inference_mode():
        plain = model(input_ids=ids).logits
        with injector.inject(injector.capture(CONTEXT % 80)):
            assert torch.equal(model(input_ids=ids).logits, plain)
        with injector.inject(injector.capture(CONTEXT % 80), gate=1.0):
            assert difference(model(input_ids=ids).logits, plain) > 0.01


def test_refusals_change_nothing(model, injector):
    context = injector.capture(CONTEXT)
    foreign = GemmaInjector(make_model(seed=1)).capture(CONTEXT)
    expected = logits(injector.inject(context, gate=1.0).model)
    refused = {
        r"comes from .* does not fit": (ContextError, {"external_kv_cache": foreign}),
        r"gate names layers \[0\]; the layers with a block are \[1, 3\]": (SpecError, {"gate": {0: 1.0}}),
        r"holds layers \[1, 3\], not 0": (ContextError, {"layers": [0]}),
        r"layers \[0\], which are not global": (SpecError, {"split": {0: HeadSplit((0, 1))}}),
        r"there is no layer 9": (SpecError, {"external_kv_cache": None, "layers": [9]}),
        r"holds KV heads \(1,\) of layer 1": (
            ContextError, {"external_kv_cache": context.take([1]), "split": HeadSplit((0, 1))},
        ),
    }  # fmt: skip
    for message, (error, changes) in refused.items():
        with pytest.raises(error, match=message):
            injector.inject(**{"external_kv_cache": context} | changes)
        assert torch.equal(logits(model), expected)
    injector.inject(foreign, gate=1.0, override=True)
    assert difference(logits(model), expected) > 0.01
    static = {layer: context.static_layer(layer, (0, 1)) for layer in GLOBAL}
    with pytest.raises(InputError, match=r"layers \[1, 3\] have no place for a block or no block"):
        injector.place_blocks(static, {})
