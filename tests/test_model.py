"""Model and load: text, likelihood, generation, capture and attach, on every backend."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import convert_tiny

import lyra
from lyra import ContextError, HeadSplit, InputError, Model, ModelError, SpecError, StaticContext

TEXT = "and the note of a hand, then that of the other; and the end of it"
LIVE = "the hand and"
CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def loaded(backend: str, tiny_folder: Path) -> Model:
    return lyra.load(tiny_folder, backend=backend)


@pytest.fixture
def model(loaded: Model) -> Model:
    loaded.detach()
    return loaded


@pytest.fixture(scope="module")
def context(loaded: Model) -> StaticContext:
    loaded.detach()
    return loaded.capture(TEXT)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    return exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))


# plain


def test_logits_are_those_of_hugging_face(model: Model, tiny_folder: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = model.tokenizer.encode(TEXT).ids
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(model.logits(TEXT), expected, **CLOSE)


def test_logits_take_text_ids_and_rows(model: Model) -> None:
    ids = model.text.encode(LIVE)
    of_text, of_ids, of_rows = model.logits(LIVE), model.logits(ids), model.logits(np.array([ids, ids]))
    assert of_text.shape == (len(ids), model.spec.vocab_size)
    assert of_text.dtype == np.float32
    np.testing.assert_array_equal(of_text, of_ids)
    np.testing.assert_allclose(of_rows, np.stack([of_text, of_text]), **CLOSE)


def test_padding_has_no_influence(model: Model) -> None:
    ids = model.text.encode(LIVE)
    padded = np.array([[0, 0, *ids]])
    mask = np.array([[False, False] + [True] * len(ids)])
    np.testing.assert_allclose(model.logits(padded, mask)[0, 2:], model.logits(LIVE), **CLOSE)


def test_score_is_the_likelihood_of_every_token_but_the_first(model: Model) -> None:
    ids = model.text.encode(TEXT)
    log_probs = log_softmax(model.logits(TEXT))
    expected = [-log_probs[i, token] for i, token in enumerate(ids[1:])]
    score = model.score(TEXT)
    np.testing.assert_allclose(score.nll, expected, **CLOSE)
    assert score.num_tokens == len(ids) - 1
    assert score.total == pytest.approx(sum(expected), rel=1e-4)
    assert score.perplexity == pytest.approx(np.exp(np.mean(expected)), rel=1e-3)
    assert "perplexity" in repr(score)


def greedy(model: Model, prompt: str, steps: int) -> list[int]:
    ids = model.text.encode(prompt)
    start = len(ids)
    for _ in range(steps):
        ids.append(int(model.logits(ids)[-1].argmax()))
        if ids[-1] in model.text.stops:
            break
    return ids[start:]


def test_generation_is_greedy(model: Model) -> None:
    assert model.generate(LIVE, 6) == model.text.decode(greedy(model, LIVE, 6))


def test_prompts_of_different_lengths_generate_as_they_do_alone(model: Model) -> None:
    prompts = [LIVE, "a", "of the other and that"]
    assert model.generate(prompts, 5) == [model.generate(prompt, 5) for prompt in prompts]
    assert model.generate([], 5) == []
    assert model.generate(LIVE, 0) == ""


def test_generation_stops_at_a_stop_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = greedy(model, LIVE, 6)
    stop = made[3]
    monkeypatch.setattr(model, "text", type(model.text)(model.tokenizer, model.text.bos, (stop,)))
    assert model.generate(LIVE, 6) == model.text.decode(made[: made.index(stop)])


def test_streamed_pieces_join_to_the_whole(model: Model) -> None:
    pieces: list[str] = []
    whole = model.generate(LIVE, 8, on_text=pieces.append)
    assert "".join(pieces) == whole
    assert "".join(model.stream(LIVE, 8)) == whole


def test_closing_a_stream_ends_the_generation(model: Model) -> None:
    stream = model.stream("a", 2000)
    first = next(stream)
    stream.close()
    assert first
    assert list(stream) == []


def test_an_error_in_a_stream_is_raised_where_it_is_read(model: Model) -> None:
    with pytest.raises(InputError):
        list(model.stream(LIVE, -1))


# contexts


def test_a_captured_context_holds_the_text(model: Model, context: StaticContext) -> None:
    ids = model.text.encode(TEXT)
    assert context.tokens.tolist() == [ids]
    assert ids[0] == model.text.bos
    assert context.positions.tolist() == [list(range(len(ids)))]
    assert context.kv_heads == {1: (0, 1), 3: (0, 1)}
    assert context.fingerprint == model.fingerprint()
    assert context.fingerprint.model == "tiny-gemma"


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_of_any_size_give_the_same_context(model: Model, context: StaticContext, chunk_size: int) -> None:
    seen: list[tuple[int, int]] = []
    found = model.capture(TEXT, chunk_size=chunk_size, on_progress=lambda *done: seen.append(done))
    total = context.num_tokens
    assert total > 2 * model.spec.sliding.sliding_window
    assert seen[-1] == (total, total)
    assert len(seen) == -(-total // chunk_size)
    for number, layer in context.layers.items():
        np.testing.assert_allclose(found.layers[number].k, layer.k, **CLOSE)
        np.testing.assert_allclose(found.layers[number].v, layer.v, **CLOSE)


def test_some_layers_and_heads(model: Model, context: StaticContext) -> None:
    assert model.capture(TEXT, layers=[3]).kv_heads == {3: (0, 1)}
    assert model.capture(TEXT, kv_heads=[1]).kv_heads == {1: (1,), 3: (1,)}
    some = model.capture(TEXT, kv_heads={1: [0]})
    assert some.kv_heads == {1: (0,)}
    np.testing.assert_array_equal(some.layers[1].k, context.layers[1].k[:, :1])
    with pytest.raises(InputError, match=r"layers \[0\] are not global; the global layers are \[1, 3\]"):
        model.capture(TEXT, layers=[0])


def test_attach_changes_the_model_and_detach_restores_it(model: Model, context: StaticContext) -> None:
    plain = model.logits(LIVE)
    model.attach(context)
    assert model.context is context
    attached = model.logits(LIVE)
    assert np.abs(attached - plain).max() > 0.01
    model.attach(context, HeadSplit.none())
    np.testing.assert_array_equal(model.logits(LIVE), plain)
    model.attach(context)
    np.testing.assert_array_equal(model.logits(LIVE), attached)
    model.detach()
    np.testing.assert_array_equal(model.logits(LIVE), plain)
    assert model.context is None
    assert model.spec == model.engine.spec


def test_a_global_model_with_all_heads_reads_a_context_like_a_prefix(backend: str, global_folder: Path) -> None:
    model = lyra.load(global_folder, backend=backend)
    ids = model.text.encode(TEXT)
    before, after = ids[:20], ids[20:]
    joined = model.logits(ids)[20:]
    model.attach(model.capture(before), HeadSplit.all(model.spec))
    np.testing.assert_allclose(model.logits(after), joined, **CLOSE)
    assert np.abs(model.logits(after) - joined).max() < 0.05 * np.abs(joined).max()
    model.attach(StaticContext.stack([model.context] * 2), HeadSplit.all(model.spec))
    np.testing.assert_allclose(model.logits(np.array([after, after])), np.stack([joined, joined]), **CLOSE)
    with pytest.raises(InputError, match="context has 2 rows and the call 1"):
        model.logits(after)


def test_generation_with_a_context_is_greedy_too(model: Model, context: StaticContext) -> None:
    model.attach(context)
    assert model.generate(LIVE, 6) == model.text.decode(greedy(model, LIVE, 6))


def test_the_default_split_follows_the_context(model: Model, context: StaticContext) -> None:
    model.attach(context)
    assert model.spec.layer(1).lyra_q_heads == (2, 3)
    model.attach(context.take([0]))
    assert model.spec.layer(1).lyra_q_heads == (0, 1)
    model.attach(context.take({3: [1]}))
    assert model.spec.layer(1).lyra_q_heads == ()
    assert model.spec.layer(3).lyra_q_heads == (2, 3)


def test_splits_differ_by_layer(model: Model, context: StaticContext) -> None:
    model.attach(context, {1: HeadSplit(lyra_q_heads=(0, 1)), 3: HeadSplit.all(model.spec)}, live="self")
    assert model.spec.layer(1).lyra_kv_heads == (0,)
    assert model.spec.layer(3).lyra_kv_heads == (0, 1)
    assert model.spec.layer(3).static.live == "self"
    assert model.spec.layer(0).split is None


def test_the_modes_differ(model: Model, context: StaticContext) -> None:
    found = []
    for live in ("causal", "self", "none"):
        for positions in ("continue", "overlay"):
            model.attach(context, live=live, positions=positions)
            found.append(model.logits(TEXT))
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            assert np.abs(one - other).max() > 1e-3


def test_a_context_and_a_split_given_to_load(
    model: Model, context: StaticContext, backend: str, tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "context.safetensors"
    context.save(path)
    split = HeadSplit(lyra_q_heads=(0, 1))
    model.attach(context, split)
    ready = lyra.load(tiny_folder, backend=backend, split=split, context=path)
    assert ready.spec.layer(1).lyra_q_heads == (0, 1)
    np.testing.assert_array_equal(ready.logits(LIVE), model.logits(LIVE))
    assert "context" in repr(ready).lower()


def test_a_captured_context_serves_in_another_backend(tiny_folder: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    models = [lyra.load(tiny_folder, backend=name) for name in ("torch", "jax")]
    contexts = [model.capture(TEXT) for model in models]
    found = []
    for model, context in zip(models, reversed(contexts), strict=True):
        model.attach(context)
        found.append(model.logits(LIVE))
    np.testing.assert_allclose(found[0], found[1], **CLOSE)


# whose context it is


def test_a_context_of_other_weights_is_refused_and_changes_nothing(
    model: Model, context: StaticContext, backend: str, other_folder: Path
) -> None:
    foreign = lyra.load(other_folder, backend=backend).capture(TEXT)
    model.attach(context)
    before = model.logits(LIVE)
    with pytest.raises(ContextError, match=r"the k and v projections or k_norm of layers \[1, 3\] differ"):
        model.attach(foreign)
    assert model.context is context
    np.testing.assert_array_equal(model.logits(LIVE), before)
    model.attach(foreign, override=True)
    assert model.context is foreign


def test_a_refused_split_changes_nothing(model: Model, context: StaticContext) -> None:
    model.attach(context.take([1]))
    before, spec = model.logits(LIVE), model.spec
    with pytest.raises(ContextError, match=r"holds KV heads \(1,\) of layer 1, not \[0\]"):
        model.attach(context.take([1]), HeadSplit.all(model.spec))
    with pytest.raises(SpecError, match="cuts a GQA group"):
        model.attach(context, HeadSplit(lyra_q_heads=(3,)))
    with pytest.raises(SpecError, match=r"splits name layers \[0\]"):
        model.attach(context, {0: HeadSplit(lyra_q_heads=(2, 3))})
    assert model.spec == spec
    np.testing.assert_array_equal(model.logits(LIVE), before)


def test_bfloat16_weights_have_the_same_fingerprint(model: Model, tiny_folder: Path) -> None:
    pytest.importorskip("torch")
    assert lyra.load(tiny_folder, backend="torch", dtype="bfloat16").fingerprint() == model.fingerprint()


def test_capture_needs_the_plain_model(model: Model, context: StaticContext) -> None:
    model.attach(context)
    with pytest.raises(InputError, match="detach"):
        model.capture(TEXT)


# without a tokenizer, and other things that a model cannot do


def test_without_a_tokenizer_ids_serve(model: Model, backend: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    bare = lyra.load(folder, backend=backend)
    ids = model.text.encode(TEXT)
    np.testing.assert_array_equal(bare.logits(ids), model.logits(ids))
    assert bare.fingerprint().tokenizer is None
    model.attach(bare.capture(ids))
    for call in (bare.generate, bare.score, bare.capture):
        with pytest.raises(ModelError, match=r"came without a tokenizer\.json; give it token ids"):
            call(TEXT)


def test_what_is_not_there_is_said_so(model: Model, tiny_folder: Path) -> None:
    with pytest.raises(ModelError, match="on_text serves one prompt, got 2"):
        model.generate([LIVE, LIVE], on_text=print)
    with pytest.raises(ModelError, match="unknown mode 'both'; known: parallel, sequential"):
        lyra.load(tiny_folder, mode="both")


@pytest.mark.parametrize(
    ("call", "value", "message"),
    [
        ("logits", np.zeros((2, 2, 2), int), r"shape \(2, 2, 2\)"),
        ("logits", np.zeros(3), "dtype float64"),
        ("score", [2], "at least 2 tokens"),
        ("capture", [], r"ids are of shape \(0,\); expected a text or whole numbers \[T\], at least 1 token"),
        ("capture", np.zeros((1, 0), int), "at least 1 token"),
    ],
)
def test_ids_that_are_none(model: Model, call: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        getattr(model, call)(value)


# the real model


def test_a_context_of_the_real_model_helps_with_its_own_text(backend: str, real_folder: Path) -> None:
    from pydoc_data.topics import topics

    model = lyra.load(real_folder, backend=backend)
    assert model.generate("The capital of France is", 4) == " the capital of the"
    ids = model.text.encode(topics["types"])[:128]
    plain = model.score(ids[:64]).mean_nll
    model.attach(model.capture(ids, chunk_size=100))
    assert model.score(ids[:64]).mean_nll < 0.75 * plain


# what importing brings in


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_importing_lyra_imports_no_framework() -> None:
    done = run_python(
        "import sys, lyra\n"
        "assert lyra.HeadSplit and lyra.StaticContext and lyra.__version__ and set(lyra.__all__) <= set(dir(lyra))\n"
        "assert all(getattr(lyra, name) is not None for name in lyra.__all__ if name != 'Lyra')  # a torch module\n"
        "print([name for name in ('torch', 'jax', 'flax', 'transformers') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lyra.nonsense


@pytest.mark.parametrize(
    ("name", "blocked"), [("torch", ("jax", "flax")), ("jax", ("torch", "transformers", "accelerate"))]
)
def test_a_backend_needs_only_its_own_framework(name: str, blocked: tuple[str, ...], tiny_folder: Path) -> None:
    pytest.importorskip(name)
    code = (
        f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport lyra\n"
        f"model = lyra.load({str(tiny_folder)!r}, backend={name!r})\n"
        f"model.attach(model.capture({TEXT!r}))\nprint(len(model.generate('a', 3)))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_a_model_of_the_same_shape_is_made_twice_alike(tmp_path: Path, tiny_folder: Path) -> None:
    again = convert_tiny(tmp_path / "tiny")
    assert (again / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
