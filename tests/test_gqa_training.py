"""The studies' language model: its text, its training on both backends, and checkpoints that survive an interrupt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gqa_command import data_of, write_text

from lyra.spec.errors import InputError, SpecError
from lyra.studies import parallel
from lyra.studies.corpus import Corpus, batch, byte_pairs, once, read_corpus, windows
from lyra.studies.language_model import LMSpec, initial_weights, logits
from lyra.studies.parallel import train_all
from lyra.studies.perplexity import distance, stability, summary
from lyra.studies.training import MOMENTS, Curve, Recipe, Task, Trained, read_checkpoint, train

pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = LMSpec(vocab_size=256, num_kv_heads=2, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4)
RECIPE = Recipe(steps=24, rows=4, window=16, warmup=4, evaluations=3, learning_rate=1e-2)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short text in English."""
    return write_text(tmp_path_factory.mktemp("text"), 6000)


@pytest.fixture(scope="module")
def corpus(text_file: Path) -> Corpus:
    """The same in bytes."""
    return read_corpus(text_file, 256, RECIPE.window)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the short run leaves its models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def models(corpus: Corpus, folder: Path) -> dict[str, Trained]:
    """The short run on every backend."""
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    return {backend: train(Task(backend, SPEC, RECIPE, 0), corpus, folder) for backend in ("torch", "jax")}


def test_training_stability(models: dict[str, Trained], backend: str) -> None:
    """Loss finite and falling, gradients bounded."""
    curve = models[backend].curve
    found = stability(curve)
    assert found["stable"]
    assert np.isfinite(curve.loss).all()
    assert found["last_loss"] < found["first_loss"] - 0.3
    assert 0 < found["largest_gradient_norm"] < 10
    assert [step for step, _ in curve.held_out] == [0, 8, 16, 24]
    assert curve.held_out[-1][1] < curve.held_out[0][1]


def test_an_unstable_run_is_called_so() -> None:
    falling = [3.0 - 0.1 * step for step in range(20)]
    assert stability(Curve(falling, [1.0] * 20))["stable"]
    assert not stability(Curve(falling[::-1], [1.0] * 20))["stable"]
    assert not stability(Curve(falling, [1.0] * 19 + [99.0]))["stable"]
    assert not stability(Curve([*falling[:-1], float("nan")], [1.0] * 20))["stable"]


def test_both_backends_give_the_same_curve(models: dict[str, Trained]) -> None:
    """From the same weights, in the same order: the stated distance is 1e-4 nats over this run."""
    apart = distance(list(models.values()))
    assert apart is not None
    assert 0 < apart["loss"] < 1e-4
    assert apart["held_out"] < 1e-4
    assert distance([models["torch"]]) is None


def test_interrupted_and_resumed_is_uninterrupted(
    models: dict[str, Trained], corpus: Corpus, folder: Path, backend: str, tmp_path: Path
) -> None:
    whole = models[backend]

    def interrupt(done: int) -> None:
        if done == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(whole.task, corpus, tmp_path, interrupt, every=5)
    (path,) = tmp_path.iterdir()
    kept, curve = read_checkpoint(path)
    assert len(curve.loss) == 10
    assert sum(name.startswith(MOMENTS) for name in kept) == 2 * len(SPEC.weight_shapes())

    seen: list[int] = []
    resumed = train(whole.task, corpus, tmp_path, seen.append)
    assert seen == list(range(10, 25))
    assert resumed.curve == whole.curve
    np.testing.assert_equal(read_checkpoint(path), read_checkpoint(whole.task.file(folder, corpus)))

    again = train(whole.task, corpus, tmp_path, seen.append)
    assert (seen[15:], again.curve) == ([24], whole.curve)  # finished: only read
    assert set(read_checkpoint(path)[0]) == set(SPEC.weight_shapes())


def test_processes_train_what_one_does_and_stop_when_interrupted(
    models: dict[str, Trained], corpus: Corpus, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes of one thread each; whenever the one that waits for them is interrupted, they stop too."""
    tasks = [replace(models["torch"].task, seed=seed) for seed in (0, 1)]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_all(tasks, corpus, tmp_path, 2, interrupt)
    told: list[int] = []
    first, second = train_all(tasks, corpus, tmp_path, 2, lambda what, done, total: told.append(done))
    assert told == sorted(told)
    assert told[-1] == 2 * RECIPE.steps
    monkeypatch.setattr(parallel, "_in_processes", interrupt)
    assert train_all(tasks, corpus, tmp_path, 2)[1].curve == second.curve  # finished: no process is started
    assert first.curve == models["torch"].curve
    assert second.curve != first.curve
    np.testing.assert_equal(*(read_checkpoint(first.task.file(place, corpus)) for place in (tmp_path, folder)))


def test_a_checkpoint_belongs_to_what_it_was_trained_with(corpus: Corpus, tmp_path: Path) -> None:
    task = Task("torch", SPEC, RECIPE, 0)
    others = [
        replace(task, backend="jax"),
        replace(task, spec=SPEC.replace(num_kv_heads=1)),
        replace(task, recipe=RECIPE.replace(learning_rate=1e-3)),
        replace(task, seed=1),
        replace(task, start="whole", origin=task),
        replace(task, start="mean", origin=task),
        replace(task, start="mean", origin=replace(task, seed=1)),
    ]
    files = {one.file(tmp_path, corpus) for one in [task, *others]}
    assert len(files | {task.file(tmp_path, replace(corpus, digest="other"))}) == len(others) + 2
    task.file(tmp_path, corpus).write_bytes(b"something else")
    with pytest.raises(InputError, match=r"is no \.safetensors file"):
        train(task, corpus, tmp_path)


def test_the_model_is_hugging_faces_llama() -> None:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaModel

    from lyra.studies.torch_lm import OPERATIONS

    rng = np.random.default_rng(0)
    weights = {name: value + 0.1 * rng.standard_normal(value.shape) for name, value in initial_weights(SPEC, 0).items()}
    tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in weights.items()}
    theirs = LlamaModel(
        LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, rms_norm_eps=SPEC.norm_eps, hidden_act="silu", max_position_embeddings=64,
        )
    )  # fmt: skip
    theirs.load_state_dict(tensors, strict=True)
    tokens = torch.tensor(rng.integers(0, 256, (2, 11)))
    with torch.inference_mode():
        expected = theirs(input_ids=tokens).last_hidden_state @ tensors["embed_tokens.weight"].T
        whole, _ = logits(OPERATIONS, SPEC, tensors, tokens)
        first, caches = logits(OPERATIONS, SPEC, tensors, tokens[:, :7])
        rest, _ = logits(OPERATIONS, SPEC, tensors, tokens[:, 7:], caches)
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat((first, rest), dim=1), whole, atol=2e-5, rtol=1e-5)


def test_models_of_one_seed_differ_in_kv_heads_only() -> None:
    many, few = (initial_weights(SPEC.replace(num_kv_heads=heads), 3) for heads in (4, 1))
    for name, value in few.items():
        np.testing.assert_array_equal(value, many[name][: len(value)])
        assert (value.shape == many[name].shape) == (not name.endswith(("k_proj.weight", "v_proj.weight")))
    assert not np.array_equal(many["norm.weight"], initial_weights(SPEC, 4)["embed_tokens.weight"][0])


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(SpecError, match="num_attention_heads=4 is not a multiple of num_key_value_heads=3"):
        SPEC.replace(num_kv_heads=3)
    assert SPEC.parameters() == sum(value.size for value in initial_weights(SPEC, 0).values())
    assert SPEC.cache_bytes(10) == 2 * 2 * 2 * 10 * 8 * 4


def test_the_text_is_read_once_and_its_end_held_out(text_file: Path, corpus: Corpus) -> None:
    text = once(text_file.read_text())
    assert bytes([*corpus.train, *corpus.held_out]).decode() == text
    assert len(corpus.held_out) == pytest.approx(len(text.encode()) / 10, abs=5)
    assert once("a\n\nb\n\na\n\nc") == "a\n\nb\n\nc"
    parts = windows(corpus.held_out, 16)
    assert parts.shape == ((len(corpus.held_out) - 1) // 16, 17)
    np.testing.assert_array_equal(parts[:, :-1].ravel(), corpus.held_out[: parts.shape[0] * 16])
    np.testing.assert_array_equal(parts[1:, 0], parts[:-1, -1])


def test_pairs_of_bytes_spell_any_text(text_file: Path) -> None:
    made = read_corpus(text_file, 300, 16)
    assert made.vocab_size == 300
    assert made.bytes_per_token > 1.1
    tokenizer = byte_pairs(once(text_file.read_text())[:5000], 300)
    assert tokenizer.decode(tokenizer.encode("naïve 漢字").ids) == "naïve 漢字"


def test_a_batch_follows_from_seed_and_step(corpus: Corpus) -> None:
    one = batch(corpus.train, 0, 5, 4, 16)
    assert one.shape == (4, 17)
    np.testing.assert_array_equal(one, batch(corpus.train, 0, 5, 4, 16))
    assert not np.array_equal(one, batch(corpus.train, 0, 6, 4, 16))
    assert not np.array_equal(one, batch(corpus.train, 1, 5, 4, 16))


def test_what_cannot_be_trained_is_refused(text_file: Path, corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than one window of 4000"):
        read_corpus(text_file, 256, 4000)
    with pytest.raises(InputError, match="expected 256, which are bytes, or more"):
        read_corpus(text_file, 100, 16)
    with pytest.raises(InputError, match="the studies know no backend 'numpy'; expected torch or jax"):
        train(Task("numpy", SPEC, RECIPE, 0), corpus, tmp_path)


def test_the_mean_and_its_error_are_over_the_seeds() -> None:
    def run(heads: int, seed: int, loss: float) -> Trained:
        curve = Curve([3.0] * 10 + [2.0] * 10, [1.0] * 20, [(20, loss)])
        return Trained(Task("torch", SPEC.replace(num_kv_heads=heads), RECIPE, seed), curve)

    many, few = summary([run(4, 0, 1.0), run(1, 0, 1.1), run(4, 1, 2.0), run(1, 1, 2.3)], tokens=100)
    assert (many["kind"], few["kind"], few["seeds"]) == ("MHA", "MQA", 2)
    assert many["perplexity"] == pytest.approx((np.exp(1) + np.exp(2)) / 2)
    assert many["deviation"] == pytest.approx(np.std([np.exp(1), np.exp(2)], ddof=1))
    assert few["loss_change"] == pytest.approx(0.2)
    assert few["loss_change_error"] == pytest.approx(0.1)
    assert many["cache_bytes"] == 4 * few["cache_bytes"]
    (alone,) = summary([run(4, 0, 1.0)], tokens=100)
    assert alone["deviation"] is None


def test_the_command_trains_and_draws(text_file: Path, tmp_path: Path) -> None:
    sizes = "--steps 12 --rows 2 --window 16 --width 16 --layers 1 --heads 2 --vocabulary 256 --seeds 2"
    models, plots = tmp_path / "models", f"--plot {tmp_path}/p.png --curves {tmp_path}/c.png"
    options = f"{sizes} --processes 1 --no-speed --checkpoints {models}"
    data, _ = data_of(f"perplexity {text_file} {options} {plots}", tmp_path)
    assert [(row["kind"], row["seeds"]) for row in data["rows"]] == [("MHA", 2), ("MQA", 2)]
    assert {len(run["loss"]) for run in data["runs"]} == {12}
    assert data["distance"] is None
    assert len(list(models.iterdir())) == 4
    for name in ("p.png", "c.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
