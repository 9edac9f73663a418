"""A model whose numbers overflow says so, with the layer and the token where that begins, and gives no text."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gemma import GLOBAL, make_model, random_ids

import lyra
from lyra import Model, NotFiniteError
from lyra.spec.attaching import static_layers
from lyra.spec.split import HeadSplit

HUGE = 3e38
IDS = [2, 270, 5, 271]


@pytest.fixture
def model(backend: str, global_folder: Path) -> Model:
    """A model of its own, of two layers, for a test to break."""
    return lyra.load(global_folder, backend=backend)


def set_weights(model: Any, change: Callable[[Any], None]) -> None:
    """Change a model's weights where they are: `change` gets the module that holds embedding and layers."""
    if hasattr(model.module, "model"):
        import torch

        with torch.no_grad():
            change(model.module.model)
    else:
        change(model.module)


def scaled(layer: int, by: float) -> Callable[[Any], None]:
    """The output of a layer's feed-forward block made larger."""

    def change(text: Any) -> None:
        text.layers[layer].post_feedforward_layernorm.weight[...] = by

    return change


def embedded(token: int, by: float) -> Callable[[Any], None]:
    """The embedding of a token made larger."""

    def change(text: Any) -> None:
        weight = text.embed_tokens.weight
        if hasattr(weight, "get_value"):  # a parameter of flax, whose arrays are not written into
            weight[...] = weight[...].at[token].set(by)
        else:
            weight[token] = by

    return change


def refused(model: Model, where: str) -> None:
    """Every call of the model that needs all its layers says where it began."""
    steps: list[str] = []
    calls = [
        lambda: model.logits(IDS),
        lambda: model.score(IDS),
        lambda: model.generate("the hand", 3, on_text=steps.append),
        lambda: list(model.stream("the hand", 3)),
        lambda: model.capture(IDS),
    ]
    for call in calls:
        with pytest.raises(NotFiniteError, match=f"gives NaN or infinity, first in {where}"):
            call()
    assert steps == []


def test_the_first_layer_is_named(model: Model) -> None:
    set_weights(model, scaled(0, HUGE))
    refused(model, r"the output of layer 0 at token 0\. The numbers of float32 end at 3\.4e38: look for NaN, infinity")


def test_what_comes_before_the_overflow_is_still_right(model: Model) -> None:
    """Keys and values of a layer do not depend on what overflows behind it."""
    before = model.capture(IDS)
    set_weights(model, scaled(1, HUGE))
    after = model.capture(IDS)
    np.testing.assert_array_equal(after.layers[1].v, before.layers[1].v)
    with pytest.raises(NotFiniteError, match=r"the output of layer 1 at token 0"):
        model.score(IDS)


def test_the_first_token_is_named(model: Model) -> None:
    set_weights(model, embedded(5, HUGE))
    for call in (model.logits, model.score, model.capture):
        with pytest.raises(NotFiniteError, match="first in the embedding at token 2"):
            call(IDS)


def test_padding_is_not_looked_at(model: Model) -> None:
    whole = model.logits([2, 270, 271])
    set_weights(model, embedded(5, 1e30))
    mask = np.array([[False, True, True, True]])
    found = model.logits([[5, 2, 270, 271]], mask)[0, 1:]
    keep = np.arange(whole.shape[1]) != 5  # the head has the embedding's weights
    np.testing.assert_allclose(found[:, keep], whole[:, keep], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def untied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untied")
    make_model(tie_word_embeddings=False).save_pretrained(path)
    return path


def test_a_token_that_was_made_is_named_too(backend: str, untied_folder: Path) -> None:
    """Generation goes on until the token whose embedding overflows has been fed."""
    model = lyra.load(untied_folder, backend=backend)
    ids, seen = random_ids(2, 9), []
    mask = np.ones(ids.shape, bool)
    mask[0, :2] = False
    made = model.engine.generate(ids, mask, max_new_tokens=3)
    set_weights(model, embedded(int(made[1, 1]), HUGE))
    assert made[1, 1] not in {*ids.ravel(), *made[:, 0], made[0, 1]}
    with pytest.raises(NotFiniteError, match="first in the embedding at token 10 of row 1"):
        model.engine.generate(ids, mask, max_new_tokens=5, on_token=seen.append)
    np.testing.assert_array_equal(np.stack(seen, axis=1), made[:, :2])


def test_a_row_that_has_stopped_is_not_looked_at(backend: str, untied_folder: Path) -> None:
    model = lyra.load(untied_folder, backend=backend)
    ids = random_ids(2, 9)
    made = model.engine.generate(ids, max_new_tokens=4)
    stop = int(made[1, 0])
    assert stop not in made[0]
    set_weights(model, embedded(stop, HUGE))
    assert stop not in ids
    again = model.engine.generate(ids, max_new_tokens=4, stop_ids=[stop])
    np.testing.assert_array_equal(again, np.stack([made[0], np.full(4, stop)]))


def test_texts_under_gates_too(backend: str, untied_folder: Path) -> None:
    model = lyra.load(untied_folder, backend=backend)
    context, ids = model.capture(random_ids(1, 9)[0]), random_ids(1, 7, seed=2)
    set_weights(model, scaled(3, HUGE))
    static = static_layers(context, dict.fromkeys(GLOBAL, HeadSplit.all(model.spec)))
    text = model.engine.gated(ids, 3, static)
    gates = np.ones((1, len(GLOBAL), model.spec.num_attention_heads))
    with pytest.raises(NotFiniteError, match="first in the output of layer 3 at token 0"):
        text.nll(gates)
    if backend == "torch":  # in JAX a gradient takes seconds to compile, and ends in the same check
        with pytest.raises(NotFiniteError, match="first in the output of layer 3 at token 0"):
            text.gradient(gates[0])


def test_float16_is_right_or_refused(untied_folder: Path, tmp_path: Path) -> None:
    """PyTorch computes in float16 where the model stays below 65,504, and says what to do where it does not."""
    pytest.importorskip("torch")
    ids = random_ids(1, 9)[0]
    wide, narrow = (lyra.load(untied_folder, dtype=dtype) for dtype in ("float32", "float16"))
    np.testing.assert_allclose(narrow.logits(ids), wide.logits(ids), atol=0.05 * np.abs(wide.logits(ids)).max())
    module = make_model(tie_word_embeddings=False)
    set_weights(type("Held", (), {"module": module}), scaled(1, 6e4))
    module.save_pretrained(tmp_path)
    fits, overflows = (lyra.load(tmp_path, dtype=dtype) for dtype in ("bfloat16", "float16"))
    assert np.isfinite(fits.logits(ids)).all()
    assert fits.score(ids).num_tokens == 8
    advice = r"float16, .* layer 1 at token 0\. The numbers of float16 end at 65,504: load the model with dtype='bfl"
    for call in (overflows.logits, overflows.score, overflows.capture):
        with pytest.raises(NotFiniteError, match=advice):
            call(ids)
    assert overflows.capture(ids, layers=[1]).num_tokens == 9


def test_a_backend_that_gives_nan_all_the_same_is_not_believed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = np.zeros((1, 3), np.float32)
    bad[0, 1] = np.nan
    monkeypatch.setattr(model.engine, "log_probs", lambda ids: bad)
    with pytest.raises(NotFiniteError, match="gives NaN or infinity for the probability of token 2"):
        model.score(IDS)


def test_the_real_model_in_float16(real_folder: Path) -> None:
    """Its activations reach 104,000: text would come out empty."""
    pytest.importorskip("torch")
    model = lyra.load(real_folder, dtype="float16")
    with pytest.raises(NotFiniteError, match=r"in float16, .* first in the output of layer 7 at token 0\. "):
        model.generate("hi", 5)


def test_rows_are_looked_at_to_the_last_number(backend: str) -> None:
    finite = importlib.import_module(f"lyra.backends.{backend}_impl.finite")
    array = importlib.import_module({"torch": "torch", "jax": "jax.numpy"}[backend]).asarray
    values = np.zeros((5, 7), np.float32)
    values[0] = np.finfo(np.float32).max  # finite, though their sum is not
    values[1, 2], values[2, 6], values[3, 0] = np.nan, np.inf, -np.inf
    assert np.asarray(finite.finite_rows(array(values))).tolist() == [True, False, False, False, True]
    assert np.asarray(finite.finite_rows(array(values[4:]))).tolist() == [True]
