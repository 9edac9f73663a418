"""What users change on a loaded model between two calls: whatever holds it asks the model, not what it once was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gemma import CUT, GLOBAL, LAYERS, make_model, random_ids

from lyra import Model, load
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.backends.torch_impl.model import TorchEngine
from lyra.spec import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor(random_ids(2, 11))).logits


def resized(model: Any) -> int:
    """Give a model eight more tokens and return the new vocabulary's size."""
    model.resize_token_embeddings(model.config.vocab_size + 8)
    return model.config.vocab_size


def halved(model: Any) -> int:
    """Cut the last two layers off, as one does with a ModuleList."""
    model.model.layers = model.model.layers[: LAYERS // 2]
    model.config.num_hidden_layers = LAYERS // 2
    model.config.layer_types = model.config.layer_types[: LAYERS // 2]
    return model.config.vocab_size


@pytest.mark.parametrize("change", [resized, halved])
def test_what_has_changed_on_the_module_since_is_asked_of_the_module(change: Callable[[Any], int]) -> None:
    model = make_model()
    injector, engine = GemmaInjector(model), TorchEngine(model, GemmaInjector(model).spec)
    size = change(model)
    ids = np.array([[2, size - 1, size - 2, 5, 7, 9]])
    layers = tuple(layer for layer in GLOBAL if layer < len(model.model.layers))
    context = injector.capture(ids[:, :3])
    assert tuple(context.layers) == layers == tuple(engine.capture(ids, layers))
    assert (injector.spec.vocab_size, engine.spec.num_hidden_layers) == (size, len(model.model.layers))
    assert engine.logits(ids).shape == (1, 6, size)
    expected = engine.log_probs(ids)
    assert tuple(injector.enable(split=CUT).enabled) == layers
    np.testing.assert_allclose(engine.log_probs(ids), expected, rtol=0, atol=1e-5)
    injector.enable(context, CUT)
    assert np.abs(engine.log_probs(ids) - expected).max() > 1e-3
    assert engine.generate(ids, max_new_tokens=2).shape == (1, 2)
    with pytest.raises(InputError, match=f"ids range from 2 to {size}; the vocabulary has ids 0 to {size - 1}"):
        engine.logits(np.array([[2, size]]))


def test_the_cap_of_logits_and_the_attention_are_those_that_the_model_has_now() -> None:
    model = make_model()
    injector, engine = GemmaInjector(model), TorchEngine(model, GemmaInjector(model).spec)
    context, ids = injector.capture(random_ids(1, 9)), random_ids(1, 6)
    model.config.final_logit_softcapping = 3.0
    scores = torch.log_softmax(torch.tensor(engine.logits(ids)[0, :-1]), dim=-1)
    np.testing.assert_allclose(
        engine.log_probs(ids)[0], scores.gather(1, torch.tensor(ids[0, 1:, None]))[:, 0], atol=1e-5
    )
    with injector.enable(context, CUT):
        with_sdpa = logits(model)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(logits(model), with_sdpa, rtol=0, atol=1e-5)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2
    expected = logits(model)
    with injector.enable(split=CUT):
        assert torch.equal(logits(model), expected)


def test_frequencies_that_are_no_longer_the_configs() -> None:
    model = make_model()
    injector = GemmaInjector(model)
    context = injector.capture(random_ids(1, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        injector.enable(context, CUT)
        injector.disable()
    for dtype in (torch.bfloat16, torch.float16):
        model = make_model()
        model.model.rotary_emb.to(dtype)  # as model.bfloat16() and model.half() do
        injector = GemmaInjector(model)
        with pytest.warns(UserWarning, match=rf"rounded to {dtype}.*Load the model with dtype="):
            injector.enable(context, CUT)
        with pytest.warns(UserWarning, match=f"rounded to {dtype}"):
            injector.attach(context)
    model = make_model()
    model.config.rope_parameters["full_attention"]["rope_theta"] = 5e5
    with pytest.raises(InputError, match=r"theta 500000 .* the config was changed after the model was made"):
        GemmaInjector(model).enable(context, CUT, override=True)


def test_a_context_is_captured_in_evaluation_mode_whatever_the_models_is() -> None:
    ids = random_ids(1, 20)
    expected = GemmaInjector(make_model()).capture(ids, chunk_size=6)
    model = make_model(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = {name: part.training for name, part in model.named_modules()}
    model.gradient_checkpointing_enable()
    injector = GemmaInjector(model)
    for found in (
        injector.capture(ids, chunk_size=6),
        Model(TorchEngine(model, injector.spec)).capture(ids[0], chunk_size=6),
    ):
        for layer, one in found.layers.items():
            np.testing.assert_array_equal(one.k, expected.layers[layer].k)
            np.testing.assert_array_equal(one.v, expected.layers[layer].v)
    assert {name: part.training for name, part in model.named_modules()} == modes


def test_tokens_that_were_added_are_in_the_fingerprint(tiny_folder: Path) -> None:
    model = load(tiny_folder)
    before = model.fingerprint()
    assert model.fingerprint() == before
    size = model.tokenizer.get_vocab_size() + model.tokenizer.add_tokens(["<sight>"])
    model.module.resize_token_embeddings(size)
    assert model.fingerprint().tokenizer != before.tokenizer
    assert model.capture("and <sight> the").tokens.max() == size - 1
