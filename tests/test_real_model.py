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

TOKENS, CHUNKED, CONTEXT, NEW = 600, 560, 256, 32
PROMPTS = {"formatstrings": 24, "debugger": 29, "attribute-access": 34}
"""Entries of the language reference, and how many of their first tokens are continued."""

TOLERANCE = 2e-5
"""Of the largest logit; rounding makes up to 4e-6 of it in JAX."""


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
    """Within the tolerance at all 600 positions, past the window, with the same argmax everywhere."""
    check_logits(model.logits(ids), theirs)


def check_logits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max()
    np.testing.assert_array_equal(ours.argmax(axis=-1), theirs.argmax(axis=-1))


def test_logits_in_jax_do_not_depend_on_how_the_text_is_fed(
    models: dict[str, lyra.Model], ids: np.ndarray, theirs: np.ndarray
) -> None:
    """In chunks of 7 until they are past the window, then token by token; bench/jax_parity.py does each for all."""
    from lyra.backends.jax_impl import forward

    graph, parts, mask = forward.split_module(models["jax"].module), [], np.ones((1, TOKENS), bool)
    cache = forward.open_cache(graph, 1, TOKENS)
    for part in np.split(np.arange(TOKENS), [*range(7, CHUNKED, 7), *range(CHUNKED, TOKENS)]):
        hidden, cache, *_ = forward.prefill(graph, ids[None, part].astype(np.int32), mask[:, part], cache, {})
        parts.append(np.asarray(hidden[0]))
    check_logits(np.asarray(forward.logits(graph, np.concatenate(parts))), theirs)


def test_greedy_tokens_with_a_context_agree(models: dict[str, lyra.Model], ids: np.ndarray) -> None:
    """Three prompts in one left-padded batch, with a context and without: both backends generate the same 32 tokens, or
    part where the two most likely ones are as good as equal."""
    context = models["torch"].capture(ids[:CONTEXT])
    split = HeadSplit.last_q(models["torch"].spec, 3)
    text = models["torch"].text
    prompts = [text.encode(topics[name])[:length] for name, length in PROMPTS.items()]
    padded, mask = text.left_padded(prompts)
    made: dict[str, list[np.ndarray]] = {}
    for name, model in models.items():
        model.detach()
        made[name] = [model.engine.generate(padded, mask, max_new_tokens=NEW)]
        model.attach(context, split=split)
        made[name].append(model.engine.generate(padded, mask, max_new_tokens=NEW))
    assert (made["torch"][0] != made["torch"][1]).any(axis=1).all()
    for attached in (1, 0):
        for prompt, ours, theirs in zip(prompts, made["jax"][attached], made["torch"][attached], strict=True):
            assert ours.shape == (NEW,)
            if (ours != theirs).any():
                check_close_call(models["torch"], [*prompt, *theirs[: (ours != theirs).argmax()]])
        for model in models.values():
            model.detach()


def check_close_call(model: lyra.Model, ids: list[int]) -> None:
    """The two most likely tokens after ids are within the tolerance of each other."""
    last = np.sort(model.logits(ids)[-1])
    assert last[-1] - last[-2] < 2 * TOLERANCE * np.abs(last).max()


def test_a_context_in_fewer_bits_loses_next_to_nothing(model: lyra.Model, ids: np.ndarray) -> None:
    """The text again and the next tokens: float32's likelihood within a few hundredths of a nat a token."""
    context = model.capture(ids[:CONTEXT])
    live = ids[[0, *range(CONTEXT // 2, CONTEXT + 100)]]
    model.attach(context)
    exact = model.score(live).nll
    for dtype, most in (("bfloat16", 0.01), ("int8", 0.02)):
        model.attach(context.astype(dtype))
        changed = np.abs(model.score(live).nll - exact).mean()
        assert 0 < changed < most, dtype


def test_the_shipped_heads_keep_what_all_heads_gain(models: dict[str, lyra.Model]) -> None:
    """Two heads of twelve, on a document that they were not chosen on."""
    model = models["torch"]
    model.detach()
    document = np.array(model.text.encode(topics["debugger"])[:640])
    every = lyra.HeadSplit.all(model.spec)
    context = model.capture(document[:512])
    passages = {"next": document[[0, *range(512, 640)]], "again": document[:128]}
    plain = {name: model.score(live).mean_nll for name, live in passages.items()}
    gains = {}
    for split in ("gemma-3-270m-lyra-2q", every):
        model.attach(context, split)
        gains[split] = {name: plain[name] - model.score(live).mean_nll for name, live in passages.items()}
    model.detach()
    for name, least in {"next": 0.7, "again": 0.95}.items():
        assert gains["gemma-3-270m-lyra-2q"][name] > least * gains[every][name] > 0
