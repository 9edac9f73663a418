"""Engines of both backends against Hugging Face's Gemma-3, on a small random model of several layers and window 8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gemma import CONFIG, CUT, GLOBAL, VOCAB, assert_close, hf_logits, left_padding, make_model, random_ids
from transformers import DynamicCache

from lyra.backends.protocol import Engine, ModelBackend, get_backend
from lyra.spec import HeadSplit, InputError, SpecError, StaticSpec
from lyra.spec.inputs import StaticLayer

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = {"half": HeadSplit((2, 3)), "cut": CUT, "all": HeadSplit((0, 1, 2, 3))}


@cache
def load(backend: str, folder: str) -> Any:
    """An engine; each is loaded once."""
    loader = get_backend(backend)
    assert isinstance(loader, ModelBackend)
    return loader.load(folder)


@pytest.fixture
def engine(backend: str, gemma_folder: Path) -> Iterator[Any]:
    """The model of `gemma` in a backend, with nothing attached."""
    loaded = load(backend, str(gemma_folder))
    yield loaded
    loaded.detach()


def context_of(engine: Any, split: HeadSplit, tokens: int = 19, rows: int = 1, seed: int = 5) -> dict[int, StaticLayer]:
    """A context captured from random tokens, for the Lyra heads of `split`, with one slot masked and poisoned."""
    kv_heads = list(split.bind(engine.spec.attention).lyra_kv_heads)
    parts = [engine.capture(random_ids(1, tokens, seed=seed + row), GLOBAL) for row in range(rows)]
    context = {}
    for layer in GLOBAL:
        k, v = (np.concatenate([part[layer][place][:, kv_heads] for part in parts]) for place in (0, 1))
        mask = np.ones((rows, tokens), bool)
        mask[:, 3], k[:, :, 3], v[:, :, 3] = False, 1e30, -1e30
        context[layer] = StaticLayer(k, v, mask, np.tile(np.arange(tokens), (rows, 1)))
    return context


def attach(engine: Any, split: HeadSplit, live: Any = "causal", positions: Any = "continue", rows: int = 1) -> None:
    engine.attach(context_of(engine, split, rows=rows), dict.fromkeys(GLOBAL, split), StaticSpec(live, positions))


def token_by_token(engine: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits [B,T,V] of a run through the model's cache that feeds one token a call."""
    steps = []
    if isinstance(engine.module, torch.nn.Module):
        kept = DynamicCache(config=engine.module.config)
        places = torch.tensor(np.maximum(np.cumsum(mask, axis=1) - 1, 0))
        for t in range(ids.shape[1]):
            call = {"input_ids": torch.tensor(ids[:, t : t + 1]), "attention_mask": torch.tensor(mask[:, : t + 1])}
            with torch.inference_mode():
                result = engine.module(**call, position_ids=places[:, t : t + 1], past_key_values=kept, use_cache=True)
            steps.append(result.logits.numpy())
    else:
        from lyra.backends.jax_impl import forward

        graph = forward.split_module(engine.module)
        kept = forward.open_cache(graph, len(ids), ids.shape[1])
        for t in range(ids.shape[1]):
            made = forward.prefill(graph, ids[:, t : t + 1], mask[:, t : t + 1], kept, engine._attached)
            kept, hidden = made.cache, np.asarray(made.hidden)[:, 0]
            steps.append(np.asarray(forward.logits(graph, hidden))[:, None])
    return np.concatenate(steps, axis=1)


def test_an_engine_is_the_protocols(engine: Any) -> None:
    assert all(hasattr(engine, name) for name in Engine.__annotations__)
    assert engine.spec.global_layers == GLOBAL
    assert engine.spec.attention.scale == CONFIG["query_pre_attn_scalar"] ** -0.5


@pytest.mark.parametrize("tokens", [1, 5, 23, 530])
def test_logits_equal_hugging_face(engine: Any, gemma: Any, tokens: int) -> None:
    ids = random_ids(2, tokens)
    logits = engine.logits(ids)
    assert logits.shape == (2, tokens, VOCAB)
    assert logits.dtype == np.float32
    assert_close(logits, hf_logits(gemma, ids))


def test_logits_of_padded_rows_equal_hugging_face(engine: Any, gemma: Any) -> None:
    ids, mask = random_ids(3, 21), left_padding(3, 21)
    logits = engine.logits(ids, mask)
    assert np.isfinite(logits).all()
    assert_close(logits[mask], hf_logits(gemma, ids, mask)[mask])


def test_padding_may_be_on_the_right(engine: Any) -> None:
    ids, mask = random_ids(2, 21), np.ones((2, 21), bool)
    mask[1, 14:] = False
    logits = engine.logits(ids, mask)
    assert_close(logits[0], engine.logits(ids[:1])[0])
    assert_close(logits[1][mask[1]], engine.logits(ids[1:, mask[1]])[0])


def test_log_probs_equal_hugging_face(engine: Any, backend: str, gemma: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(2, 23)
    table = torch.log_softmax(torch.tensor(hf_logits(gemma, ids)).double(), dim=-1)[:, :-1]
    expected = table.gather(2, torch.tensor(ids[:, 1:, None]))[:, :, 0].numpy()
    assert engine.log_probs(ids).dtype == np.float32
    assert_close(engine.log_probs(ids), expected)
    monkeypatch.setattr(f"lyra.backends.{backend}_impl.logits.LOGITS_AT_ONCE", 7 * VOCAB)
    assert_close(engine.log_probs(ids), expected)
    assert_close(engine.logits(ids), hf_logits(gemma, ids))
    assert engine.log_probs(ids[:, :1]).shape == (2, 0)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "left padded"])
def test_generate_equals_hugging_face(engine: Any, gemma: Any, padded: bool) -> None:
    ids, mask = random_ids(3, 11), left_padding(3, 11) if padded else np.ones((3, 11), bool)
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    expected = gemma.generate(torch.tensor(ids), attention_mask=torch.tensor(mask.astype(np.int64)), **settings)
    new = engine.generate(ids, mask if padded else None, max_new_tokens=24)
    assert np.issubdtype(new.dtype, np.integer)
    np.testing.assert_array_equal(new, expected[:, 11:].numpy())


def test_stop_ids_and_on_token(engine: Any) -> None:
    ids = random_ids(3, 11)
    free = engine.generate(ids, max_new_tokens=12)
    stop = [int(free[0, 3]), int(free[1, 6]), int(free[2, 8])]
    ends = [int(np.argmax(np.isin(row, stop))) for row in free]
    steps: list[np.ndarray] = []
    new = engine.generate(ids, max_new_tokens=12, stop_ids=stop, on_token=steps.append)
    assert new.shape == (3, max(ends) + 1)
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(new[row, : end + 1], free[row, : end + 1])
        assert (new[row, end:] == free[row, end]).all()
    np.testing.assert_array_equal(np.stack(steps, axis=1), new)
    assert engine.generate(ids, max_new_tokens=0).shape == (3, 0)


def hf_capture(model: Any, ids: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
    attention, seen = model.model.layers[layer].self_attn, {}
    hooks = [
        attention.k_norm.register_forward_hook(lambda _m, _i, out: seen.update(k=out)),
        attention.v_proj.register_forward_hook(lambda _m, _i, out: seen.update(v=out)),
    ]
    hf_logits(model, ids)
    for hook in hooks:
        hook.remove()
    return seen["k"].numpy(), seen["v"].unflatten(-1, (-1, CONFIG["head_dim"])).transpose(1, 2).numpy()


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 512])
def test_capture_equals_hooks_on_hugging_face(engine: Any, gemma: Any, chunk_size: int) -> None:
    ids, done = random_ids(1, 45), []
    captured = engine.capture(ids, [3, 0, 1], chunk_size=chunk_size, on_chunk=done.append)
    assert set(captured) == {0, 1, 3}
    for layer, (k, v) in captured.items():
        expected_k, expected_v = hf_capture(gemma, ids, layer)
        assert k.shape == v.shape == (1, 2, 45, 16)
        assert k.dtype == v.dtype == np.float32
        assert_close(k, expected_k)
        assert_close(v, expected_v)
    assert done[-1] == 45
    assert len(done) == -(-45 // chunk_size)
    assert np.diff([0, *done]).max() <= chunk_size


@pytest.mark.parametrize(
    ("live", "positions", "rows"),
    [("causal", "continue", 1), ("self", "continue", 2), ("none", "overlay", 1), ("causal", "overlay", 2)],
)
@pytest.mark.parametrize("split", SPLITS)
def test_attached_prefill_equals_token_by_token(engine: Any, split: str, live: str, positions: str, rows: int) -> None:
    attach(engine, SPLITS[split], live, positions, rows)
    ids, mask = random_ids(2, 13), left_padding(2, 13)
    one_shot = engine.logits(ids, mask)
    assert np.isfinite(one_shot).all()
    np.testing.assert_allclose(
        token_by_token(engine, ids, mask)[mask], one_shot[mask], rtol=0, atol=3e-5 * np.abs(one_shot).max()
    )
    new = engine.generate(ids, mask, max_new_tokens=3)
    whole = np.concatenate([ids, new], axis=1)
    whole_mask = np.concatenate([mask, np.ones_like(new, bool)], axis=1)
    np.testing.assert_array_equal(engine.logits(whole, whole_mask)[:, 12:-1].argmax(-1), new)


@pytest.mark.parametrize("layers", [1, 2])
def test_all_heads_continuing_equal_an_ordinary_prefix(backend: str, tmp_path: Path, layers: int) -> None:
    """With every layer global and every head Lyra's, a context is the same as its text in front."""
    make_model(layer_types=["full_attention"] * layers, num_hidden_layers=layers).save_pretrained(tmp_path)
    engine = get_backend(backend).load(str(tmp_path))
    ids, numbers = random_ids(1, 30), range(layers)
    places, mask = np.arange(18)[None], np.ones((1, 18), bool)
    captured = engine.capture(ids[:, :18], list(numbers))
    context = {layer: StaticLayer(k, v, mask, places) for layer, (k, v) in captured.items()}
    expected = engine.logits(ids)[:, 18:]
    engine.attach(context, dict.fromkeys(numbers, HeadSplit.all(engine.spec)), StaticSpec())
    assert_close(engine.logits(ids[:, 18:]), expected)


def test_attaching_nothing_and_detaching_restore_the_bits(engine: Any) -> None:
    ids, splits, context = random_ids(2, 13), dict.fromkeys(GLOBAL, CUT), context_of(engine, CUT)
    plain = engine.logits(ids)
    hidden = {layer: part._replace(mask=np.zeros_like(part.mask)) for layer, part in context.items()}
    nothing = [({}, dict.fromkeys(GLOBAL, HeadSplit.none()), StaticSpec("none")), ({}, splits, StaticSpec())]
    for given in (*nothing, (hidden, splits, StaticSpec())):
        engine.attach(*given)
        np.testing.assert_array_equal(engine.logits(ids), plain)
    for given in ((context, splits, StaticSpec()), ({3: context[3]}, {3: CUT}, StaticSpec("self"))):
        engine.attach(*given)
        assert np.abs(engine.logits(ids) - plain).max() > 0.1
    engine.detach()
    np.testing.assert_array_equal(engine.logits(ids), plain)


def test_every_mode_has_an_effect_of_its_own(engine: Any) -> None:
    ids = random_ids(1, 9)
    seen = [engine.logits(ids)]
    for live in ("causal", "self", "none"):
        for positions in ("continue", "overlay"):
            attach(engine, SPLITS["half"], live, positions)
            seen.append(engine.logits(ids))
            engine.detach()
    for place, logits in enumerate(seen):
        assert all(np.abs(logits - other).max() > 1e-3 for other in seen[:place])


@pytest.mark.parametrize("live", ["causal", "self", "none"])
def test_padding_changes_nothing_beside_a_context(engine: Any, live: str) -> None:
    attach(engine, CUT, live)
    ids, mask = random_ids(2, 15), left_padding(2, 15)
    logits, scores = engine.logits(ids, mask), engine.log_probs(ids, mask)
    new = engine.generate(ids, mask, max_new_tokens=5)
    assert np.isfinite(logits).all()
    for row, real in enumerate(mask):
        words = ids[row : row + 1, real]
        assert_close(logits[row, real], engine.logits(words)[0])
        np.testing.assert_array_equal(engine.generate(words, max_new_tokens=5)[0], new[row])
        np.testing.assert_allclose(scores[row, 1 - words.shape[1] :], engine.log_probs(words)[0], atol=1e-3)
    right = mask[:, ::-1]  # a view that runs backwards, too
    turned = engine.logits(ids, right)
    for row, real in enumerate(right):
        assert_close(turned[row, real], engine.logits(ids[row : row + 1, real])[0])


@pytest.mark.parametrize("context", [False, True])
def test_padding_may_stand_between_tokens(engine: Any, context: bool) -> None:
    """Beyond the window of 8 too, which counts tokens and no padding. Clauses POSITION-4, SLIDING-1."""
    if context:
        attach(engine, CUT, "self")
    ids, mask = random_ids(2, 21), np.ones((2, 21), bool)
    mask[0, [0, 3, 4, 5, 11, 16]] = False
    logits, scores = engine.logits(ids, mask), engine.log_probs(ids, mask)
    new = engine.generate(ids, mask, max_new_tokens=4)
    looked = engine.attentions(ids, mask, layers=[0, 3])
    for row, real in enumerate(mask):
        words = ids[row : row + 1, real]
        assert_close(logits[row, real], engine.logits(words)[0])
        np.testing.assert_allclose(scores[row][real[1:]][-words.shape[1] + 1 :], engine.log_probs(words)[0], atol=1e-3)
        np.testing.assert_array_equal(engine.generate(words, max_new_tokens=4)[0], new[row])
        for layer, alone in engine.attentions(words, layers=[0, 3]).items():
            slots = alone.shape[3] - alone.shape[2]
            seen = looked[layer][row][:, real][:, :, np.concatenate([np.ones(slots, bool), real])]
            np.testing.assert_allclose(seen, alone[0], atol=1e-5)
    assert not looked[0][0][:, ~mask[0]].any()


def test_a_context_of_one_row_serves_three_and_rows_may_have_their_own(engine: Any) -> None:
    ids, splits = random_ids(3, 9), dict.fromkeys(GLOBAL, SPLITS["half"])
    shared, other = (context_of(engine, SPLITS["half"], seed=seed) for seed in (7, 8))
    engine.attach(shared, splits, StaticSpec())
    of_shared = engine.logits(ids)
    for row in range(3):
        assert_close(of_shared[row : row + 1], engine.logits(ids[row : row + 1]))
    for part in other.values():
        part.mask[:, 12:] = False
    pair = {
        layer: StaticLayer(*(np.concatenate(parts) for parts in zip(shared[layer], other[layer], strict=True)))
        for layer in GLOBAL
    }
    engine.attach(pair, splits, StaticSpec())
    both = engine.logits(ids[:2])
    with pytest.raises(InputError, match="the attached context has 2"):
        engine.logits(ids)
    assert_close(both[0], of_shared[0])
    engine.attach(other, splits, StaticSpec())
    assert_close(both[1:], engine.logits(ids[1:2]))


def test_attention_weights_are_hugging_faces(engine: Any, gemma: Any) -> None:
    for layer in (0, 3):
        weights = engine.attention_weights(layer)
        assert {name: value.shape for name, value in weights.items()} == engine.spec.layer(layer).weight_shapes()
        for name, value in weights.items():
            expected = gemma.model.layers[layer].self_attn.get_parameter(name).detach().numpy()
            np.testing.assert_array_equal(value, expected)
            value[...] = 0  # what is given out is a copy
        assert all(np.abs(value).max() > 0 for value in engine.attention_weights(layer).values())


def test_refusals(engine: Any) -> None:
    ids, context = random_ids(2, 6), context_of(engine, CUT, 5, rows=2)
    everywhere = dict.fromkeys(GLOBAL, CUT)
    with pytest.raises(InputError, match="the vocabulary has ids 0 to 96"):
        engine.logits(ids + VOCAB)
    with pytest.raises(InputError, match="expected whole numbers"):
        engine.logits(ids[0])
    with pytest.raises(InputError, match="mask has shape"):
        engine.logits(ids, np.ones((2, 5), bool))
    with pytest.raises(InputError, match="padding on the left"):
        engine.generate(ids, np.array([[True] * 6, [True] * 5 + [False]]), max_new_tokens=1)
    with pytest.raises(InputError, match="max_new_tokens is -1"):
        engine.generate(ids, max_new_tokens=-1)
    with pytest.raises(InputError, match="2 rows"):
        engine.capture(ids, [1])
    with pytest.raises(InputError, match=r"no layers \[4\]"):
        engine.capture(ids[:1], [4])
    with pytest.raises(InputError, match="chunk_size is 0"):
        engine.capture(ids[:1], [1], chunk_size=0)
    with pytest.raises(InputError, match=r"layers \[2\] are not global"):
        engine.attach({}, {2: CUT}, StaticSpec())
    with pytest.raises(InputError, match=r"layers \[1, 3\] have a context and no Lyra heads"):
        engine.attach(context, {1: HeadSplit.none()}, StaticSpec())
    with pytest.raises(InputError, match="KV heads"):
        engine.attach(context, dict.fromkeys(GLOBAL, HeadSplit((0, 1))), StaticSpec())
    with pytest.raises(SpecError, match="cuts a GQA group"):
        engine.attach(context, dict.fromkeys(GLOBAL, HeadSplit((0, 3))), StaticSpec())
    engine.attach(context, everywhere, StaticSpec())
    with pytest.raises(InputError, match="detach"):
        engine.capture(ids[:1], [1])
    with pytest.raises(InputError, match="the attached context has 2"):
        engine.logits(random_ids(3, 4))
