"""External caches for injected blocks: from token ids, and from transformers' own caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_gemma import GLOBAL, SPLITS, WINDOW, attach, left_padded, some_ids
from transformers import DynamicCache, Gemma3ForCausalLM, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from lyra.backends.torch_impl.external import turned_back
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.spec import InputError

pytestmark = pytest.mark.usefixtures("one_thread")

LONG = 2 * WINDOW + 5


@pytest.fixture
def injector(torch_engine) -> GemmaInjector:
    return GemmaInjector(torch_engine.module)


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
def test_a_cache_that_is_whole_is_the_capture(torch_engine, injector, kind):
    """Unrotated keys, as clause STORED wants them, though the sliding layers of the same cache have dropped theirs."""
    ids = some_ids(1, LONG)
    captured = torch_engine.capture(ids, GLOBAL)
    cache = filled(torch_engine, kinds_of_cache(torch_engine)[kind], ids)
    by_ids, by_cache = injector.capture(ids, chunk_size=4), injector.context_of(cache)
    assert (by_ids.tokens == ids).all()
    assert by_cache.tokens is None
    for found in (by_ids, by_cache):
        assert found.mask.all()
        assert (found.positions == np.arange(LONG)).all()
        assert found.kv_heads == dict.fromkeys(GLOBAL, (0, 1))
        for layer in GLOBAL:
            np.testing.assert_allclose(found.layers[layer].k, captured[layer].k, atol=1e-5)
            np.testing.assert_allclose(found.layers[layer].v, captured[layer].v, atol=1e-5)
    assert not by_ids.fingerprint.differences(by_cache.fingerprint)


def test_rows_of_different_lengths(torch_engine, injector):
    rows = [some_ids(1, 12)[0], some_ids(1, 7, 1)[0]]
    ids, mask = left_padded(rows)
    found = injector.context_of(filled(torch_engine, DynamicCache(), ids, mask), layers=[GLOBAL[0]], mask=mask)
    layer = found.layers[GLOBAL[0]]
    assert (found.mask == mask).all()
    for i, row in enumerate(rows):
        alone = torch_engine.capture(row[None], [GLOBAL[0]])[GLOBAL[0]]
        assert (found.positions[i, mask[i]] == np.arange(len(row))).all()
        np.testing.assert_allclose(layer.k[i][:, mask[i]], alone.k[0], atol=1e-4)
        assert not layer.k[i][:, ~mask[i]].any()
        assert not layer.v[i][:, ~mask[i]].any()


def test_keys_turn_back_to_what_they_were_however_far(torch_folder):
    """The angles of a float32 model are off by their own rounding, which grows with the position and cancels here."""
    model = Gemma3ForCausalLM.from_pretrained(torch_folder)
    k = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = model.model.rotary_emb(k, torch.tensor([[0, 70_001, 131_071]]), "full_attention")
    half = k.roll(8, dims=-1) * torch.cat((-torch.ones(8), torch.ones(8)))
    there = k * cos[:, None] + half * sin[:, None]
    assert (there - k).abs().max() > 0.5
    assert (turned_back(there, cos, sin) - k).abs().max() <= 1e-6


def test_a_cache_that_dropped_keys_is_refused(injector):
    def after(tokens: int) -> Cache:
        cache = Cache(layers=[DynamicSlidingWindowLayer(WINDOW) for _ in range(6)])
        for layer in range(6):
            cache.update(*torch.ones(2, 1, 2, tokens, 16), layer)
        return cache

    assert injector.context_of(after(WINDOW - 1)).num_tokens == WINDOW - 1
    with pytest.raises(InputError, match=r"layer 2 .* seen 8 tokens and keeps the last 7: it is a sliding-window"):
        injector.context_of(after(WINDOW))
    with pytest.raises(InputError, match="seen 8 tokens and keeps the last 7"):
        injector.attach(after(WINDOW))
    assert not injector.attached


def test_refusals(torch_engine, injector):
    ids = some_ids(1, 5)
    with pytest.raises(InputError, match="layer 2 of the cache is empty"):
        injector.context_of(DynamicCache())
    cache = filled(torch_engine, DynamicCache(), ids)
    with pytest.raises(InputError, match=r"layers \[1\] are not global"):
        injector.context_of(cache, layers=[1, 2])
    with pytest.raises(InputError, match=r"mask has shape \(1, 4\)"):
        injector.context_of(cache, mask=np.ones((1, 4), bool))
    foreign = DynamicCache()
    for layer in range(6):
        foreign.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), layer)
    with pytest.raises(InputError, match="holds 2 KV heads of 8; the model has 2 of 16"):
        injector.context_of(foreign)
    with pytest.raises(InputError, match="ids have 2 rows"):
        injector.capture(some_ids(2, 5))
    with pytest.raises(InputError, match="chunk_size is 0"):
        injector.capture(ids, chunk_size=0)
    attach(torch_engine, SPLITS["half"])
    with pytest.raises(InputError, match="take it out first"):
        injector.capture(ids)
