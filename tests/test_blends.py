"""Gates of heads: at both ends they are an attached split, in between their gradient is that of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gemma import GLOBAL, VOCAB, random_ids

from lyra.backends.protocol import BlendedEngine, get_backend
from lyra.spec import HeadSplit, InputError, StaticSpec
from lyra.spec.blends import check_blends, share_rows
from lyra.spec.inputs import StaticLayer

HEADS, KV_HEADS, HEAD_DIM, SLOTS, SCORED = 4, 2, 16, 9, 11
IDS = random_ids(1, 21)


def context() -> dict[int, StaticLayer]:
    random = np.random.default_rng(5)
    shape = (2, 1, KV_HEADS, SLOTS, HEAD_DIM)
    made = (random.normal(size=shape).astype(np.float32) for _ in GLOBAL)
    mask, positions = np.ones((1, SLOTS), bool), np.arange(SLOTS)[None]
    return {layer: StaticLayer(k, v, mask, positions) for layer, (k, v) in zip(GLOBAL, made, strict=True)}


def some_blends() -> np.ndarray:
    """None, all, each head alone in turn of the last layer, and one of numbers in between."""
    blends = np.zeros((7, len(GLOBAL), HEADS))
    blends[1] = 1
    for head in range(HEADS):
        blends[2 + head, :, head] = (0, 1)
    blends[6] = np.random.default_rng(6).random((len(GLOBAL), HEADS))
    return blends


@pytest.fixture(scope="module")
def engine(backend: str, gemma_folder: Path) -> Any:
    loaded = get_backend(backend).load(str(gemma_folder))  # type: ignore[attr-defined]
    assert isinstance(loaded, BlendedEngine)
    return loaded


def attached_nll(engine: Any, blends: np.ndarray) -> float:
    """What the model itself makes of a split, blends being 0 and 1."""
    splits = {
        layer: HeadSplit(tuple(np.flatnonzero(row).tolist()), share_kv=True)
        for layer, row in zip(GLOBAL, blends, strict=True)
    }
    static = {}
    for layer, one in context().items():
        held = list(splits[layer].bind(engine.spec).lyra_kv_heads)
        if held:
            static[layer] = one._replace(k=one.k[:, held], v=one.v[:, held])
    engine.attach(static, splits, StaticSpec())
    try:
        return -float(engine.log_probs(IDS)[0, -SCORED:].mean(dtype=np.float64))
    finally:
        engine.detach()


def test_blends_of_0_and_1_are_the_split_that_is_attached(engine: Any) -> None:
    blends = some_blends()[:6]
    found = engine.blended(IDS, SCORED, context()).nll(blends)
    assert found == pytest.approx([attached_nll(engine, blend) for blend in blends], abs=2e-6)
    assert len(set(found.round(5))) == len(found)


def test_candidates_come_back_in_their_order(engine: Any) -> None:
    text, blends = engine.blended(IDS, SCORED, context()), some_blends()
    order = [6, 0, 3, 6, 1, 5, 2]
    assert text.nll(blends[order]) == pytest.approx(text.nll(blends)[order], abs=2e-6)


def test_the_gradient_is_that_of_the_mean_nll(engine: Any) -> None:
    text, at = engine.blended(IDS, SCORED, context()), some_blends()[6] * 0.8 + 0.1
    nll, slope = text.gradient(at)
    step = 0.03
    units = step * np.eye(at.size)[[1, 4, 6]].reshape(-1, *at.shape)
    ahead, behind, here = np.split(text.nll(np.concatenate([at + units, at - units, at[None]])), [3, 6])
    assert nll == pytest.approx(float(here[0]), abs=2e-6)
    numeric = (ahead - behind) / (2 * step)
    assert slope.ravel()[[1, 4, 6]] == pytest.approx(numeric, abs=2e-3 * np.abs(slope).max())


def test_the_model_is_left_as_it_was(engine: Any) -> None:
    before = engine.log_probs(IDS)
    text = engine.blended(IDS, SCORED, context())
    text.nll(some_blends())
    np.testing.assert_array_equal(engine.log_probs(IDS), before)


def test_what_does_not_fit_is_refused(engine: Any) -> None:
    with pytest.raises(InputError, match="ids have 2 rows; expected one"):
        engine.blended(random_ids(2, 21), SCORED, context())
    with pytest.raises(InputError, match="are scored"):
        engine.blended(IDS, IDS.shape[1], context())
    with pytest.raises(InputError, match=f"the vocabulary has ids 0 to {VOCAB - 1}"):
        engine.blended(IDS + VOCAB, SCORED, context())
    with pytest.raises(InputError, match="expected numbers 0 to 1"):
        engine.blended(IDS, SCORED, context()).nll(some_blends() * 1.5)
    with pytest.raises(InputError, match="the split's Lyra heads read 2"):
        engine.blended(
            IDS,
            SCORED,
            {GLOBAL[0]: context()[GLOBAL[0]]._replace(k=np.zeros((1, 1, 3, 16)), v=np.zeros((1, 1, 3, 16)))},
        )
    engine.attach(context(), dict.fromkeys(GLOBAL, HeadSplit.all(engine.spec)), StaticSpec())
    with pytest.raises(InputError, match="detach first"):
        engine.blended(IDS, SCORED, context())
    engine.detach()


def test_both_backends_give_the_same(gemma_folder: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    texts = [get_backend(name).load(str(gemma_folder)).blended(IDS, SCORED, context()) for name in ("torch", "jax")]  # type: ignore[attr-defined]
    first, second = (text.nll(some_blends()) for text in texts)
    assert first == pytest.approx(second, abs=3e-6)
    slopes = [text.gradient(some_blends()[6])[1] for text in texts]
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-4 * np.abs(slopes[0]).max())


def test_rows_with_the_same_blends_so_far_are_one_row() -> None:
    blends = np.zeros((4, 3, 2))
    blends[1, 2, 0] = blends[2, 1, 0] = 1
    blends[3] = blends[1]
    rows = share_rows(blends)
    assert [len(layer.blends) for layer in rows.layers] == [1, 2, 3]
    for candidate, end in enumerate(rows.ends):
        at = end
        for layer in (2, 1, 0):
            np.testing.assert_array_equal(rows.layers[layer].blends[at], blends[candidate, layer])
            at = rows.layers[layer].parents[at]


def test_blends_outside_0_to_1_are_refused() -> None:
    with pytest.raises(InputError, match="expected numbers 0 to 1"):
        check_blends(np.array([[0.5, -0.1]]), (1, 2))
    with pytest.raises(InputError, match=r"blends have shape \(2, 2\)"):
        check_blends(np.zeros((2, 2)), (1, 2))


def test_the_old_names_of_blends_keep_working(gemma_folder: Path) -> None:
    """A backend of somebody else's may say "gates" and `gated`, and what imports the old names finds them."""
    from lyra.backends.protocol import BlendedEngine, GatedEngine, GatedText, blended_text
    from lyra.backends.registry import is_able

    engine = get_backend("jax").load(str(gemma_folder))  # type: ignore[attr-defined]
    assert isinstance(engine, GatedEngine) and isinstance(engine, BlendedEngine) and GatedText is not None  # noqa: PT018

    class Old:
        capabilities = frozenset({"gates"})
        spec, gated = engine.spec, engine.gated

    assert is_able(Old, "blends") and not is_able(Old, "mesh")  # type: ignore[arg-type]  # noqa: PT018
    with pytest.raises(InputError, match="has no method 'blended'"):
        blended_text(object(), IDS, SCORED, context())  # type: ignore[arg-type]
