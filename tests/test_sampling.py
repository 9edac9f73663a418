"""Sampling: the distribution that both backends draw from, against a literal reading of its definition; the draws."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lyra
from lyra import InputError, Model
from lyra.backends.protocol import Sampling

TEXT = "and the note of a hand, then that of the other; and the end of it"
LIVE = "the hand and"
MANY = 500


@pytest.fixture(scope="module")
def model(backend: str, tiny_folder: Path) -> Model:
    """A model with a context attached."""
    made = lyra.load(tiny_folder, backend=backend)
    made.attach(made.capture(TEXT))
    return made


def reading(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probabilities of one row of scores [V], by the words of `Sampling`, in float64."""
    scores = scores.astype(np.float64) / sampling.temperature
    if sampling.top_k is not None:
        scores[scores < np.sort(scores)[::-1][: sampling.top_k][-1]] = -np.inf
    probabilities = softmax(scores)
    if sampling.top_p == 1:
        return probabilities
    total, least = 0.0, 1.0
    for one in np.sort(probabilities)[::-1]:
        if total >= sampling.top_p:
            break
        total, least = total + one, one
    probabilities[probabilities < least] = 0
    return probabilities / probabilities.sum()


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def arrays(backend: str) -> tuple[Any, Any]:
    """The backend's module of sampling, and what makes its arrays."""
    framework = {"torch": "torch", "jax": "jax.numpy"}[backend]
    return importlib.import_module(f"lyra.backends.{backend}_impl.sampling"), importlib.import_module(framework).asarray


def rows(words: int, *spreads: float) -> np.ndarray:
    """Scores, a row for each standard deviation, far from 0."""
    noise = np.random.default_rng(words).standard_normal((len(spreads), words))
    return (noise * np.array(spreads)[:, None] + 300).astype(np.float32)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.37),
        Sampling(temperature=40.0),
        Sampling(top_k=1),
        Sampling(top_k=7),
        Sampling(top_k=10**6, temperature=2.0),
        Sampling(top_p=0.9),
        Sampling(top_p=0.05),
        Sampling(temperature=0.7, top_k=20, top_p=0.83),
        Sampling(temperature=1e-6, top_k=3, top_p=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("words", [5, 3000])
def test_what_is_drawn_from_is_what_the_definition_says(backend: str, sampling: Sampling, words: int) -> None:
    module, array = arrays(backend)
    scores = np.concatenate((rows(words, 0.0, 0.5, 3.0, 30.0), np.round(rows(words, 1.5, 2.5))))
    left = np.asarray(module.filtered(array(scores), sampling))
    assert left.dtype == np.float32
    expected = np.stack([reading(row, sampling) for row in scores])
    np.testing.assert_array_equal(np.isfinite(left), expected > 0)
    np.testing.assert_allclose(softmax(left), expected, rtol=1e-4, atol=1e-6)


def test_tokens_that_tie_with_the_last_one_kept_are_kept(backend: str) -> None:
    module, array = arrays(backend)
    scores = array(np.log(np.array([[0.125, 0.25, 0.25, 0.25, 0.125]], np.float32)))
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.4)):
        kept = np.isfinite(np.asarray(module.filtered(scores, sampling)))
        assert kept.tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("top_p", [1e-300, 1e-46, 1e-38, 1e-7])
@pytest.mark.parametrize("words", [5, 3000])
def test_the_most_likely_token_is_kept_however_small_top_p_is(backend: str, top_p: float, words: int) -> None:
    """float32 has 0 for such a number, and XLA for those that it calls subnormal."""
    module, array = arrays(backend)
    scores = rows(words, 0.5, 3.0, 30.0)
    sampling = Sampling(top_p=top_p)
    kept = np.isfinite(np.asarray(module.filtered(array(scores), sampling)))
    np.testing.assert_array_equal(kept, scores == scores.max(axis=1, keepdims=True))


def test_a_long_vocabulary_is_ordered_where_its_head_does_not_reach(backend: str, monkeypatch: Any) -> None:
    module, array = arrays(backend)
    scores = rows(200, 0.1, 5.0)
    expected = np.asarray(module.filtered(array(scores), Sampling(top_p=0.8)))
    for head in (1, 3, 170):
        monkeypatch.setattr(module, "HEAD", head)
        np.testing.assert_array_equal(np.asarray(module.filtered(array(scores), Sampling(top_p=0.8))), expected)


def many(model: Model, sampling: Sampling) -> np.ndarray:
    """Two tokens for each of many rows with the same prompt: [MANY, 2]."""
    ids = np.array([model.text.encode(LIVE)] * MANY)
    return model.engine.generate(ids, max_new_tokens=2, sampling=sampling, seed=5)


def test_tokens_come_as_often_as_their_probability_says(model: Model) -> None:
    """Each row of one call draws for itself, from what the model gives with the context."""
    sampling = Sampling(temperature=1.5, top_k=40, top_p=0.9)
    expected = reading(model.logits(LIVE)[-1], sampling)
    made, count = many(model, sampling), MANY
    found = np.bincount(made[:, 0], minlength=len(expected))
    assert 5 < (expected > 0).sum() <= 40
    assert found[expected == 0].sum() == 0
    assert (np.abs(found - count * expected) <= 5 * np.sqrt(count * expected) + 1).all()


def test_every_step_draws_anew(model: Model) -> None:
    made = many(model, Sampling(temperature=1e6))
    assert (made[:, 0] == made[:, 1]).mean() < 0.02


def test_the_only_token_left_is_the_most_likely_one(model: Model) -> None:
    greedy = model.generate(LIVE, 12)
    assert model.generate(LIVE, 12, temperature=3.0, top_k=1) == greedy
    assert model.generate(LIVE, 12, temperature=1e-6, top_p=0.5) == greedy
    assert model.generate(LIVE, 12, temperature=1.0, top_p=1e-38) == greedy != ""
    assert model.generate(LIVE, 12, temperature=1.0, top_p=1e-46) == greedy


def test_a_seed_gives_the_same_tokens_again_and_another_one_others(model: Model, monkeypatch: Any) -> None:
    """What the engine made is compared: random bytes look alike as text."""
    engine, made = model.engine.generate, []

    def recorded(*given: Any, **options: Any) -> np.ndarray:
        made.append(engine(*given, **options))
        return made[-1]

    monkeypatch.setattr(model.engine, "generate", recorded)
    draw = {"temperature": 2.0, "top_p": 0.99}
    text = model.generate(LIVE, 12, seed=3, **draw)
    assert "".join(model.stream(LIVE, 12, seed=3, **draw)) == text
    for seed in (4, None, None):
        model.generate(LIVE, 12, seed=seed, **draw)
    first, again, *others = [one.tolist() for one in made]
    assert again == first
    assert all(one != other for i, one in enumerate([first, *others]) for other in others[i:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected a finite number from 1e-06 up"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0; expected the number of tokens to choose from, 1 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0; expected a probability above 0, at most 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "seed": -1}, "seed is -1; expected 0 to 4294967295"),
        ({"top_p": 0.5, "seed": 1}, "top_p and seed would have no effect; give a temperature above 0"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_refused(model: Model, given: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.generate(LIVE, 2, **given)
