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

from tiny_gemma import (  # noqa: E402
    CONFIG,
    CUT,
    GLOBAL,
    VOCAB,
    assert_close,
    hf_logits,
    left_padding,
    make_model,
    random_ids,
)

from lyra.backends.jax_impl import JaxBackend, forward  # noqa: E402
from lyra.backends.jax_impl.model import JaxEngine  # noqa: E402
from lyra.backends.jax_impl.tokens import Tokens, pack_left  # noqa: E402
from lyra.backends.protocol import ModelBackend, Sampling  # noqa: E402
from lyra.spec import AttentionSpec, HeadSplit, InputError, StaticSpec  # noqa: E402
from lyra.spec.inputs import StaticLayer  # noqa: E402


def in_chunks(engine: JaxEngine, ids: np.ndarray, mask: np.ndarray, cuts: list[int]) -> np.ndarray:
    """Logits [B,T,V] of one text fed in the given pieces through the model's cache."""
    graph = forward.split_module(engine.module)
    cache, parts = forward.open_cache(graph, len(ids), ids.shape[1]), []
    for part in zip(np.split(ids, cuts, axis=1), np.split(mask, cuts, axis=1), strict=True):
        made = forward.prefill(graph, *part, cache, engine._attached)
        cache = made.cache
        parts.append(forward.logits(graph, np.asarray(made.hidden).reshape(-1, engine.spec.hidden_size)))
    return np.concatenate([np.asarray(part).reshape(len(ids), -1, VOCAB) for part in parts], axis=1)


@pytest.mark.parametrize("tokens", [1, 5, 23, 530])
def test_logits_equal_hugging_face(jax_engine: JaxEngine, gemma: Any, tokens: int) -> None:
    ids = random_ids(2, tokens)
    got = jax_engine.logits(ids)
    assert got.shape == (2, tokens, VOCAB)
    assert got.dtype == np.float32
    assert_close(got, hf_logits(gemma, ids))


def test_logits_of_padded_rows_equal_hugging_face(jax_engine: JaxEngine, gemma: Any) -> None:
    ids, mask = random_ids(3, 21), left_padding(3, 21)
    got = jax_engine.logits(ids, mask)
    assert np.isfinite(got).all()
    assert_close(got[mask], hf_logits(gemma, ids, mask)[mask])


@pytest.mark.parametrize("padding", ["right", "holes"])
def test_padding_may_be_anywhere(jax_engine: JaxEngine, padding: str) -> None:
    ids, mask = random_ids(2, 21), np.ones((2, 21), bool)
    mask[1, 14:] = False
    if padding == "holes":
        mask[1, [0, 4, 5, 6, 7, 8, 9, 12]] = False
    got = jax_engine.logits(ids, mask)
    assert_close(got[0], jax_engine.logits(ids[:1])[0])
    assert_close(got[1][mask[1]], jax_engine.logits(ids[1:, mask[1]])[0])


@pytest.mark.parametrize("cuts", [[7, 8, 20], list(range(1, 29)), [1, 2, 12, 13]], ids=["chunks", "single", "mixed"])
def test_chunks_equal_one_shot(jax_engine: JaxEngine, gemma: Any, cuts: list[int]) -> None:
    ids, mask = random_ids(2, 29), left_padding(2, 29)
    assert_close(in_chunks(jax_engine, ids, mask, cuts)[mask], hf_logits(gemma, ids, mask)[mask])


def test_log_probs_equal_hugging_face(jax_engine: JaxEngine, gemma: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(2, 23)
    expected = torch.log_softmax(torch.tensor(hf_logits(gemma, ids)), dim=-1)[:, :-1]
    expected = expected.gather(2, torch.tensor(ids[:, 1:, None]))[:, :, 0].numpy()
    assert_close(jax_engine.log_probs(ids), expected)
    monkeypatch.setattr("lyra.backends.jax_impl.logits.LOGITS_AT_ONCE", 7 * VOCAB)
    assert_close(jax_engine.log_probs(ids), expected)
    assert_close(jax_engine.logits(ids), hf_logits(gemma, ids))
    assert jax_engine.log_probs(ids[:, :1]).shape == (2, 0)


def hf_generate(model: Any, ids: np.ndarray, mask: np.ndarray | None, count: int) -> np.ndarray:
    given = torch.ones(ids.shape, dtype=torch.long) if mask is None else torch.tensor(mask.astype(np.int64))
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return model.generate(torch.tensor(ids), attention_mask=given, **settings)[:, ids.shape[1] :].numpy()


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left padded"])
def test_generate_equals_hugging_face(jax_engine: JaxEngine, gemma: Any, padded: bool) -> None:
    ids = random_ids(3, 11)
    mask = left_padding(3, 11) if padded else None
    made = jax_engine.generate(ids, mask, max_new_tokens=24)
    assert np.issubdtype(made.dtype, np.integer)
    np.testing.assert_array_equal(made, hf_generate(gemma, ids, mask, 24))


def test_stop_ids_and_on_token(jax_engine: JaxEngine) -> None:
    ids = random_ids(3, 11)
    free = jax_engine.generate(ids, max_new_tokens=12)
    stop = [int(free[0, 3]), int(free[1, 6]), int(free[2, 8])]
    ends = [int(np.argmax(np.isin(row, stop))) for row in free]
    steps: list[np.ndarray] = []
    made = jax_engine.generate(ids, max_new_tokens=12, stop_ids=stop, on_token=steps.append)
    assert made.shape == (3, max(ends) + 1)
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(made[row, : end + 1], free[row, : end + 1])
        assert (made[row, end:] == free[row, end]).all()
    np.testing.assert_array_equal(np.stack(steps, axis=1), made)
    assert jax_engine.generate(ids, max_new_tokens=0).shape == (3, 0)


def hf_capture(model: Any, ids: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
    attention, found = model.model.layers[layer].self_attn, {}
    hooks = [
        attention.k_norm.register_forward_hook(lambda _m, _i, out: found.update(k=out)),
        attention.v_proj.register_forward_hook(lambda _m, _i, out: found.update(v=out)),
    ]
    hf_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return found["k"].numpy(), found["v"].unflatten(-1, (-1, CONFIG["head_dim"])).transpose(1, 2).numpy()


@pytest.mark.parametrize("chunk_size", [1, 7, 512])
def test_capture_equals_hooks_on_hugging_face(jax_engine: JaxEngine, gemma: Any, chunk_size: int) -> None:
    ids, done = random_ids(1, 45), []
    found = jax_engine.capture(ids, [3, 0, 1], chunk_size=chunk_size, on_chunk=done.append)
    assert set(found) == {0, 1, 3}
    for layer, (k, v) in found.items():
        expected_k, expected_v = hf_capture(gemma, ids, layer)
        assert k.shape == v.shape == (1, 2, 45, 16)
        assert_close(k, expected_k)
        assert_close(v, expected_v)
    assert done[-1] == 45
    assert np.diff([0, *done]).max() <= chunk_size


def make_context(engine: JaxEngine, tokens: int, split: HeadSplit, rows: int = 1) -> dict[int, StaticLayer]:
    """A context captured from random tokens, for the Lyra heads of `split`, with some slots masked and poisoned."""
    kv_heads = list(engine.spec.attention.replace(split=split).lyra_kv_heads)
    parts = [engine.capture(random_ids(1, tokens, seed=5 + row), GLOBAL) for row in range(rows)]
    context = {}
    for layer in GLOBAL:
        k, v = (np.concatenate([part[layer][i][:, kv_heads] for part in parts]) for i in (0, 1))
        mask = np.ones((rows, tokens), bool)
        mask[:, 3] = False
        k[:, :, 3], v[:, :, 3] = 1e30, -1e30
        context[layer] = StaticLayer(k, v, mask, np.tile(np.arange(tokens), (rows, 1)))
    return context


def test_attached_layers_equal_the_attention_level(jax_engine: JaxEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last global layer's output inside the model is that of the attention level for the same input."""
    context = make_context(jax_engine, 19, CUT)
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


@pytest.mark.parametrize(
    ("live", "positions", "rows"),
    [("causal", "continue", 1), ("self", "continue", 2), ("none", "overlay", 1), ("causal", "overlay", 2)],
)
def test_attached_prefill_equals_token_by_token(jax_engine: JaxEngine, live: Any, positions: Any, rows: int) -> None:
    jax_engine.attach(
        make_context(jax_engine, 19, CUT, rows), dict.fromkeys(GLOBAL, CUT), StaticSpec(live=live, positions=positions)
    )
    ids, mask = random_ids(2, 13), left_padding(2, 13)
    one_shot = jax_engine.logits(ids, mask)
    assert_close(in_chunks(jax_engine, ids, mask, list(range(1, 13)))[mask], one_shot[mask])
    made = jax_engine.generate(ids, mask, max_new_tokens=3)
    whole = np.concatenate([ids, made], axis=1)
    whole_mask = np.concatenate([mask, np.ones_like(made, bool)], axis=1)
    np.testing.assert_array_equal(jax_engine.logits(whole, whole_mask)[:, 12:-1].argmax(-1), made)


def test_all_heads_continuing_equal_an_ordinary_prefix(tmp_path: Path) -> None:
    """With every layer global and every head Lyra's, a context is the same as its text in front."""
    make_model(layer_types=["full_attention"] * 2, num_hidden_layers=2).save_pretrained(tmp_path)
    engine = JaxBackend().load(str(tmp_path))
    ids = random_ids(1, 30)
    found = engine.capture(ids[:, :18], [0, 1])
    places, mask = np.arange(18)[None], np.ones((1, 18), bool)
    context = {layer: StaticLayer(k, v, mask, places) for layer, (k, v) in found.items()}
    expected = engine.logits(ids)[:, 18:]
    engine.attach(context, dict.fromkeys((0, 1), HeadSplit((0, 1, 2, 3))), StaticSpec())
    assert_close(engine.logits(ids[:, 18:]), expected)


def test_attaching_nothing_and_detaching_restore_the_model(jax_engine: JaxEngine) -> None:
    ids = random_ids(2, 13)
    plain = jax_engine.logits(ids)
    jax_engine.attach({}, dict.fromkeys(GLOBAL, HeadSplit.none()), StaticSpec(live="none"))
    np.testing.assert_array_equal(jax_engine.logits(ids), plain)
    jax_engine.attach({}, dict.fromkeys(GLOBAL, CUT), StaticSpec())
    np.testing.assert_array_equal(jax_engine.logits(ids), plain)
    context = make_context(jax_engine, 19, CUT)
    jax_engine.attach(context, dict.fromkeys(GLOBAL, CUT), StaticSpec())
    assert np.abs(jax_engine.logits(ids) - plain).max() > 0.1
    jax_engine.attach({3: context[3]}, {3: CUT}, StaticSpec())
    assert np.abs(jax_engine.logits(ids) - plain).max() > 0.1
    jax_engine.detach()
    np.testing.assert_array_equal(jax_engine.logits(ids), plain)


def test_decoding_compiles_once(jax_engine: JaxEngine, caplog: pytest.LogCaptureFixture) -> None:
    """200 steps for each of two prompts and two contexts, all four of different lengths; greedy ones and drawn ones."""

    def compiled_by(tokens: int, split: HeadSplit) -> list[str]:
        caplog.clear()
        context = make_context(jax_engine, tokens, split)
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


def test_attention_weights_are_hugging_faces(jax_engine: JaxEngine, gemma: Any) -> None:
    for layer in (0, 3):
        weights = jax_engine.attention_weights(layer)
        assert set(weights) == set(jax_engine.spec.layer(layer).weight_shapes())
        for name, value in weights.items():
            expected = gemma.model.layers[layer].self_attn.get_parameter(name).detach().numpy()
            np.testing.assert_array_equal(value, expected)
            value[...] = 0
    assert np.abs(jax_engine.attention_weights(0)["q_norm.weight"]).max() > 0


def test_the_backend_loads_whole_models(jax_engine: JaxEngine) -> None:
    assert isinstance(JaxBackend(), ModelBackend)
    assert jax_engine.spec.global_layers == GLOBAL


def test_refusals(jax_engine: JaxEngine) -> None:
    ids, context = random_ids(2, 6), make_context(jax_engine, 5, CUT, rows=2)
    with pytest.raises(InputError, match="the vocabulary has ids 0 to 96"):
        jax_engine.logits(ids + VOCAB)
    with pytest.raises(InputError, match="expected whole numbers"):
        jax_engine.logits(ids[0])
    with pytest.raises(InputError, match="mask has shape"):
        jax_engine.logits(ids, np.ones((2, 5), bool))
    with pytest.raises(InputError, match="put the padding on the left"):
        jax_engine.generate(ids, np.array([[True] * 6, [True] * 5 + [False]]), max_new_tokens=1)
    with pytest.raises(InputError, match="max_new_tokens is -1"):
        jax_engine.generate(ids, max_new_tokens=-1)
    with pytest.raises(InputError, match="captured from one"):
        jax_engine.capture(ids, [1])
    with pytest.raises(InputError, match=r"there are no layers \[4\]"):
        jax_engine.capture(ids[:1], [4])
    with pytest.raises(InputError, match="chunk_size is 0"):
        jax_engine.capture(ids[:1], [1], chunk_size=0)
    with pytest.raises(InputError, match=r"layers \[2\] are not global"):
        jax_engine.attach({}, {2: CUT}, StaticSpec())
    with pytest.raises(InputError, match=r"layers \[1, 3\] have a context and no Lyra heads"):
        jax_engine.attach(context, {1: HeadSplit.none()}, StaticSpec())
    with pytest.raises(InputError, match="static k and v hold"):
        jax_engine.attach(context, dict.fromkeys(GLOBAL, HeadSplit((0, 1))), StaticSpec())
    jax_engine.attach(context, dict.fromkeys(GLOBAL, CUT), StaticSpec())
    with pytest.raises(InputError, match="a context is attached"):
        jax_engine.capture(ids[:1], [1])
    with pytest.raises(InputError, match="the attached context has 2"):
        jax_engine.logits(random_ids(3, 4))


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
