"""The real Gemma-3 270M in both backends: Hugging Face's logits without a context, the same tokens with one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

import lyra
from lyra.spec import HeadSplit

torch = pytest.importorskip("torch")
pytest.importorskip("jax")

TOKENS, CONTEXT, NEW = 600, 256, 64


@pytest.fixture(scope="module")
def models(real_folder: Path) -> dict[str, lyra.Model]:
    """The model in both backends."""
    return {name: lyra.load(real_folder, backend=name) for name in ("torch", "jax")}


@pytest.fixture(scope="module")
def ids(models: dict[str, lyra.Model]) -> np.ndarray:
    """600 tokens of a real text, longer than the sliding window."""
    return np.array(models["torch"].text.encode(topics["types"])[:TOKENS])


@pytest.fixture(scope="module")
def theirs(real_folder: Path, ids: np.ndarray) -> np.ndarray:
    """Plain Hugging Face's logits [600, vocabulary]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


@pytest.fixture(params=["torch", "jax"])
def model(request: pytest.FixtureRequest, models: dict[str, lyra.Model]) -> Iterator[lyra.Model]:
    """The model in one backend, plain before and after."""
    models[request.param].detach()
    yield models[request.param]
    models[request.param].detach()


def test_logits_without_context_are_hugging_faces(model: lyra.Model, ids: np.ndarray, theirs: np.ndarray) -> None:
    """Within 1e-3 of the largest logit at all 600 positions, past the window, with the same argmax everywhere."""
    ours = model.logits(ids)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()
    np.testing.assert_array_equal(ours.argmax(axis=-1), theirs.argmax(axis=-1))


def test_greedy_tokens_with_a_context_agree(models: dict[str, lyra.Model], ids: np.ndarray) -> None:
    """With one context and one split, both backends generate the same 64 tokens; without it, other ones."""
    context = models["torch"].capture(ids[:CONTEXT])
    split = HeadSplit.last_q(models["torch"].spec, 3)
    prompt = ids[None, : 1 + 24]
    generated, plain = {}, {}
    for name, model in models.items():
        model.detach()
        plain[name] = model.engine.generate(prompt, max_new_tokens=NEW)
        model.attach(context, split=split)
        generated[name] = model.engine.generate(prompt, max_new_tokens=NEW)
        model.detach()
    assert generated["torch"].shape == (1, NEW)
    np.testing.assert_array_equal(generated["torch"], generated["jax"])
    np.testing.assert_array_equal(plain["torch"], plain["jax"])
    assert (generated["torch"] != plain["torch"]).any()
