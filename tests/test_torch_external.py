"""External caches for injected blocks: from token ids, and from transformers' own caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_gemma import GLOBAL, WINDOW, left_padded, some_ids
from transformers import DynamicCache, Gemma3ForCausalLM, StaticCache

from lyra.backends.torch_impl.external import external_from_cache, external_from_ids, turned_back
from lyra.spec import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = 2 * WINDOW + 5


def filled(engine, cache, ids: np.ndarray, mask: np.ndarray | None = None, chunk: int = 7):
    """The cache after the model has run over ids [B,T] in chunks."""
    mask = np.ones(ids.shape, bool) if mask is None else mask
    places = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.inference_mode():
        for start in range(0, ids.shape[1], chunk):
            end = start + chunk
            engine.module(
                input_ids=torch.tensor(ids[:, start:end]), attention_mask=torch.tensor(mask[:, :end].astype(int)),
                position_ids=torch.tensor(places[:, start:end]), past_key_values=cache, use_cache=True,
            )  # fmt: skip
    return cache


def kinds_of_cache(engine):
    config = engine.module.config
    return {
        "dynamic": DynamicCache(config=config),
        "without config": DynamicCache(),
        "static": StaticCache(config=config, max_cache_len=LONG + 4),
    }


@pytest.mark.parametrize("kind", ["dynamic", "without config", "static"])
def test_a_cache_that_is_whole_is_the_capture(torch_engine, kind):
    """Unrotated keys, as clause STORED wants them, to a rounding or two at any position."""
    ids = some_ids(1, LONG)
    cache = filled(torch_engine, kinds_of_cache(torch_engine)[kind], ids)
    captured, found = torch_engine.capture(ids, GLOBAL), external_from_cache(torch_engine.module, cache)
    by_ids = external_from_ids(torch_engine.module, ids, chunk_size=4)
    assert set(found) == set(by_ids) == set(GLOBAL)
    for layer in GLOBAL:
        for one in (found[layer], by_ids[layer]):
            assert one.mask.all()
            assert (one.positions == np.arange(LONG)).all()
            np.testing.assert_allclose(one.k, captured[layer].k, atol=1e-5)
            np.testing.assert_allclose(one.v, captured[layer].v, atol=1e-5)


def test_rows_of_different_lengths(torch_engine):
    rows = [some_ids(1, 12)[0], some_ids(1, 7, 1)[0]]
    ids, mask = left_padded(rows)
    cache = filled(torch_engine, DynamicCache(), ids, mask)
    found = external_from_cache(torch_engine.module, cache, [GLOBAL[0]], mask=mask)[GLOBAL[0]]
    assert (found.mask == mask).all()
    for i, row in enumerate(rows):
        alone = torch_engine.capture(row[None], [GLOBAL[0]])[GLOBAL[0]]
        real = mask[i]
        assert (found.positions[i, real] == np.arange(len(row))).all()
        np.testing.assert_allclose(found.k[i][:, real], alone.k[0], atol=1e-4)
        assert not found.k[i][:, ~real].any()
        assert not found.v[i][:, ~real].any()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_sliding_layer_that_dropped_keys_is_refused(torch_engine, kind):
    sliding = 1
    short = filled(torch_engine, kinds_of_cache(torch_engine)[kind], some_ids(1, WINDOW - 2), chunk=2)
    whole = external_from_cache(torch_engine.module, short, [sliding])[sliding]
    captured = torch_engine.capture(some_ids(1, WINDOW - 2), [sliding])[sliding]
    np.testing.assert_allclose(whole.k, captured.k, atol=1e-5)
    long = filled(torch_engine, kinds_of_cache(torch_engine)[kind], some_ids(1, LONG))
    with pytest.raises(InputError, match=rf"layer 1 .* seen {LONG} tokens and keeps the last \d+: it is a sliding"):
        external_from_cache(torch_engine.module, long, [sliding])
    assert external_from_cache(torch_engine.module, long)  # its global layers are whole


def test_keys_turn_back_to_what_they_were_however_far(torch_folder):
    """The angles of a float32 model are off by their own rounding, which grows with the position and cancels here."""
    model = Gemma3ForCausalLM.from_pretrained(torch_folder)
    k = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = model.model.rotary_emb(k, torch.tensor([[0, 70_001, 131_071]]), "full_attention")
    half = k.roll(8, dims=-1) * torch.cat((-torch.ones(8), torch.ones(8)))
    there = k * cos[:, None] + half * sin[:, None]
    assert (there - k).abs().max() > 0.5
    assert (turned_back(there, cos, sin) - k).abs().max() <= 1e-6


def test_refusals(torch_engine):
    module, ids = torch_engine.module, some_ids(1, 5)
    with pytest.raises(InputError, match="layer 2 of the cache is empty"):
        external_from_cache(module, DynamicCache())
    cache = filled(torch_engine, DynamicCache(), ids)
    with pytest.raises(InputError, match=r"there are no layers \[6\]"):
        external_from_cache(module, cache, [2, 6])
    with pytest.raises(InputError, match=r"mask has shape \(1, 4\)"):
        external_from_cache(module, cache, mask=np.ones((1, 4), bool))
    foreign = DynamicCache()
    for layer in range(6):
        foreign.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), layer)
    with pytest.raises(InputError, match="holds 2 KV heads of 8; the model has 2 of 16"):
        external_from_cache(module, foreign)
    with pytest.raises(InputError, match="ids has 2 rows"):
        external_from_ids(module, some_ids(2, 5))
    with pytest.raises(InputError, match="chunk_size is 0"):
        external_from_ids(module, ids, chunk_size=0)
