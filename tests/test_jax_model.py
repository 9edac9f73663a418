"""Whole models in JAX against Hugging Face's Gemma-3, on a small random model with several layers and window 8."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nnx = pytest.importorskip("flax.nnx")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from test_engines import context_of  # noqa: E402
from tiny_gemma import (  # noqa: E402
    CUT,
    GLOBAL,
    VOCAB,
    assert_close,
    hf_logits,
    left_padding,
    random_ids,
)

from lyra.backends.jax_impl import JaxBackend, forward  # noqa: E402
from lyra.backends.jax_impl.model import JaxEngine  # noqa: E402
from lyra.backends.jax_impl.tokens import Tokens, pack_left  # noqa: E402
from lyra.backends.protocol import Sampling  # noqa: E402
from lyra.spec import AttentionSpec, HeadSplit, InputError, StaticSpec  # noqa: E402


def in_chunks(engine: JaxEngine, ids: np.ndarray, mask: np.ndarray, cuts: list[int]) -> np.ndarray:
    """Logits [B,T,V] of one text fed in the given pieces through the model's cache."""
    graph = forward.split_module(engine.module)
    cache, parts = forward.open_cache(graph, len(ids), ids.shape[1]), []
    for part in zip(np.split(ids, cuts, axis=1), np.split(mask, cuts, axis=1), strict=True):
        made = forward.prefill(graph, *part, cache, engine._attached)
        cache = made.cache
        parts.append(forward.logits(graph, np.asarray(made.hidden).reshape(-1, engine.spec.hidden_size)))
    return np.concatenate([np.asarray(part).reshape(len(ids), -1, VOCAB) for part in parts], axis=1)


def test_padding_may_be_anywhere(jax_engine: JaxEngine) -> None:
    ids, mask = random_ids(2, 21), np.ones((2, 21), bool)
    mask[1, [0, 4, 5, 6, 7, 8, 9, 12, *range(14, 21)]] = False
    got = jax_engine.logits(ids, mask)
    assert_close(got[0], jax_engine.logits(ids[:1])[0])
    assert_close(got[1][mask[1]], jax_engine.logits(ids[1:, mask[1]])[0])


@pytest.mark.parametrize("cuts", [[7, 8, 20], list(range(1, 29)), [1, 2, 12, 13]], ids=["chunks", "single", "mixed"])
def test_chunks_equal_one_shot(jax_engine: JaxEngine, gemma: Any, cuts: list[int]) -> None:
    ids, mask = random_ids(2, 29), left_padding(2, 29)
    assert_close(in_chunks(jax_engine, ids, mask, cuts)[mask], hf_logits(gemma, ids, mask)[mask])


def test_attached_layers_equal_the_attention_level(jax_engine: JaxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last global layer's output inside the model is that of the attention level for the same input."""
    context = context_of(jax_engine, CUT)
    mode = StaticSpec(live="self", positions="overlay")
    jax_engine.attach(context, dict.fromkeys(GLOBAL, CUT), mode)
    ids, width = random_ids(2, 9), 16
    packed = pack_left(Tokens(ids, np.ones_like(ids, bool)))
    seen: dict[str, np.ndarray] = {}
    attention_class = type(jax_engine.module.layers[3].self_attn)
    original = attention_class.__call__

    def watched(self: Any, x: Any, call: Any, attached: Any, *rest: Any) -> Any:
        made = original(self, x, call, attached, *rest)
        if attached is not None:
            seen["x"], seen["output"] = np.asarray(x), np.asarray(made[0])
        return made

    monkeypatch.setattr(attention_class, "__call__", watched)
    graph = forward.split_module(jax_engine.module)
    jax_engine.module(packed.ids, packed.mask, forward.open_cache(graph, 2, width), jax_engine._attached)
    layer = JaxBackend().attention(
        jax_engine.spec.attention.replace(split=CUT, static=mode), jax_engine.attention_weights(GLOBAL[-1])
    )
    real = slice(width - 9, None)
    positions = np.tile(np.arange(9), (2, 1))
    alone = layer(seen["x"][:, real], positions=positions, static=context[GLOBAL[-1]])
    assert_close(seen["output"][:, real], alone.output)


def test_decoding_compiles_once(jax_engine: JaxEngine, caplog: pytest.LogCaptureFixture) -> None:
    """200 steps for each of two prompts and two contexts, all four of different lengths; greedy ones and drawn ones."""

    def compiled_by(tokens: int, split: HeadSplit) -> list[str]:
        caplog.clear()
        context = context_of(jax_engine, split, tokens)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            jax_engine.attach(context, dict.fromkeys(GLOBAL, split), StaticSpec(live="self"))
            for prompt, sampling in ((9, None), (40, Sampling(top_k=5, top_p=0.9))):
                made = jax_engine.generate(random_ids(4, prompt), max_new_tokens=201, sampling=sampling, seed=tokens)
                assert made.shape == (4, 201)
        jax_engine.detach()
        return [line for line in caplog.messages if "Finished XLA compilation" in line]

    jax.clear_caches()
    first = compiled_by(21, CUT)
    assert sum("jit(_decode)" in line for line in first) == 1
    assert sum("jit(_prefill)" in line for line in first) == 2
    assert compiled_by(33, HeadSplit((0, 2), share_kv=True)) == []


def test_changes_to_the_module_show(gemma_folder: Path) -> None:
    engine = JaxBackend().load(str(gemma_folder))
    ids = random_ids(1, 5)
    before = engine.logits(ids)
    weight = engine.module.layers[0].mlp.up_proj.weight
    weight[...] = weight[...] ** 2
    assert np.abs(engine.logits(ids) - before).max() > 1e-3


def test_specs_of_the_layers_are_the_models(jax_engine: JaxEngine) -> None:
    for index, layer in enumerate(jax_engine.module.layers):
        spec: AttentionSpec = layer.self_attn.spec
        assert (spec.sliding_window is None) == (index in GLOBAL)
        assert spec == jax_engine.spec.layer(index)


def test_a_vocabulary_that_has_grown_since_is_the_models(gemma_folder: Path) -> None:
    engine = JaxEngine.load(str(gemma_folder))
    rows = engine.module.embed_tokens.weight[...]
    more = np.concatenate([rows, np.full((3, rows.shape[1]), 0.5, np.float32)])
    engine.module.embed_tokens.weight = nnx.Param(jax.numpy.asarray(more))
    assert engine.logits(np.array([[2, VOCAB + 2]])).shape == (1, 2, VOCAB + 3)
    assert engine.log_probs(np.array([[2, VOCAB + 2]])).shape == (1, 1)
    with pytest.raises(InputError, match=f"ids range from 2 to {VOCAB + 3}"):
        engine.logits(np.array([[2, VOCAB + 3]]))
