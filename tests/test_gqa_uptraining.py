"""MHA checkpoints with fewer KV heads: the conversion, and training on from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gqa_command import data_of, write_text

from lyra.spec.errors import InputError
from lyra.studies.conversion import METHODS, Method, share_kv_heads
from lyra.studies.corpus import read_corpus
from lyra.studies.language_model import LMSpec, initial_weights, logits
from lyra.studies.parallel import train_all
from lyra.studies.perplexity import sweep
from lyra.studies.training import Curve, Recipe, Task, Trained
from lyra.studies.uptraining import conversions, summary

SPEC = LMSpec(
    vocab_size=256, num_kv_heads=4, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, norm_eps=1e-6
)  # with this eps a model learns something in so few steps
HEAD_DIM = SPEC.attention.head_dim
RECIPE = Recipe(steps=120, rows=8, window=16, warmup=5, learning_rate=1e-2, evaluations=1)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text in English."""
    return write_text(tmp_path_factory.mktemp("text"), 40_000)


def heads(weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A projection by head, [H,head_dim,E]."""
    return weights[name].reshape(-1, HEAD_DIM, SPEC.hidden_size)


def test_a_mean_a_first_or_a_random_head_stands_for_its_group() -> None:
    weights = initial_weights(SPEC, 0)
    name = "layers.1.self_attn.v_proj.weight"
    mean, first, random = (share_kv_heads(weights, HEAD_DIM, 2, method) for method in METHODS)
    np.testing.assert_allclose(heads(mean, name)[1], heads(weights, name)[2:].mean(axis=0), rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(heads(first, name)[1], heads(weights, name)[2])
    assert heads(random, name).std() == pytest.approx(weights[name].std(), rel=0.1)
    assert not np.array_equal(heads(random, name), heads(share_kv_heads(weights, HEAD_DIM, 2, "random", 1), name))
    for made in (mean, first, random):
        assert {key: value.shape for key, value in made.items()} == SPEC.replace(num_kv_heads=2).weight_shapes()
        assert all(made[key] is weights[key] for key in weights if "k_proj" not in key and "v_proj" not in key)
        assert made[name].dtype == np.float32


@pytest.mark.parametrize("method", ["mean", "first"])
def test_equal_heads_lose_nothing(method: Method) -> None:
    """Where the heads of every group are equal, fewer of them are the same model."""
    torch = pytest.importorskip("torch")
    from lyra.studies.torch_lm import OPERATIONS, arrays

    weights = initial_weights(SPEC, 0)
    for name in weights:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = 20 * np.repeat(heads(weights, name)[::2], 2, axis=0).reshape(weights[name].shape)
    tokens = torch.arange(2 * 9).reshape(2, 9)
    found = []
    for spec, own in ((SPEC, weights), (SPEC.replace(num_kv_heads=2), share_kv_heads(weights, HEAD_DIM, 2, method))):
        with torch.inference_mode():
            found.append(logits(OPERATIONS, spec, arrays(own), tokens)[0])
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)
    assert found[0].std() > 0.05


def test_biases_are_pooled_too_and_as_many_heads_stay_as_they_are() -> None:
    weights = {"k_proj.bias": np.arange(8.0), "k_proj.weight": np.ones((8, 3)), "q_proj.weight": np.ones((8, 3))}
    np.testing.assert_array_equal(share_kv_heads(weights, 2, 1)["k_proj.bias"], [3, 4])
    np.testing.assert_array_equal(share_kv_heads(weights, 2, 4)["k_proj.bias"], weights["k_proj.bias"])


@pytest.mark.parametrize(
    ("names", "sizes", "says"),
    [
        (["k_proj.weight"], (2, 3), "k_proj.weight has 8 rows, 4 heads of 2; expected whole heads"),
        (["k_proj.weight"], (3, 1), "2.66667 heads of 3"),
        (["k_proj.weight"], (2, 0), "num_kv_heads=0"),
        (["c_attn.weight"], (2, 2), "no weight is called …k_proj or …v_proj; found c_attn.weight"),
    ],
)
def test_what_cannot_be_converted_is_refused(names: list[str], sizes: tuple[int, int], says: str) -> None:
    with pytest.raises(InputError, match=says):
        share_kv_heads({name: np.ones((8, 3)) for name in names}, *sizes)
    with pytest.raises(InputError, match="expected one of mean, first, random"):
        share_kv_heads({"k_proj.weight": np.ones((8, 3))}, 2, 2, "median")  # type: ignore[arg-type]


@pytest.mark.usefixtures("one_thread")
def test_pooled_heads_start_better_than_random_ones(text_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    originals = sweep(SPEC, RECIPE, [4], 1, ["torch"])
    tasks = [*originals, *conversions(originals, (1,), 10)]
    told: list[tuple[str, int, int]] = []
    corpus = read_corpus(text_file, 256, RECIPE.window)
    rows = summary(train_all(tasks, corpus, tmp_path, 1, lambda *at: told.append(at)))
    found = {row["start"]: row for row in rows}
    assert list(found) == ["whole", *METHODS]
    assert found["whole"]["at_start"] == pytest.approx(found["whole"]["original"], abs=1e-6)
    assert found["mean"]["at_start"] < found["random"]["at_start"]
    for start in ("first", "random"):  # pooled heads begin so close to the original that ten steps may lose a little
        assert found[start]["at_end"] < found[start]["at_start"]
    assert told[-1][1:] == (160, 160)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert tasks[-1].recipe.first == RECIPE.steps

    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == len(tasks)
    assert summary(train_all(tasks, corpus, tmp_path, 1)) == rows  # trained already: read
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def test_a_row_is_a_mean_over_the_seeds() -> None:
    originals = [
        Trained(task, Curve(held_out=[(120, 1.0 + task.seed)])) for task in sweep(SPEC, RECIPE, [4], 2, ["torch"])
    ]

    def run(start: Method, seed: int, *losses: float) -> Trained:
        task = Task("torch", SPEC.replace(num_kv_heads=1), RECIPE, seed, start, originals[seed].task)
        return Trained(task, Curve([1.0], [1.0], list(enumerate(losses))))

    runs = [run("mean", 0, 3.0, 2.0), run("first", 0, 4.0, 1.0), run("mean", 1, 5.0, 2.0), run("first", 1, 4.0, 3.0)]
    mean, first = summary([*originals, *runs])
    assert (mean["original"], mean["at_start"], mean["at_end"]) == (1.5, 4.0, 2.0)
    assert (first["pooled_wins"], mean["pooled_wins"]) == (1, 0)
    assert first["held_out"] == [(0, 4.0), (1, 2.0)]


def test_the_command_converts_and_draws(text_file: Path, tmp_path: Path) -> None:
    sizes = "--steps 6 --rows 2 --window 16 --width 16 --layers 1 --heads 2 --vocabulary 256 --seeds 1"
    options = f"{sizes} --uptraining 4 --processes 1 --checkpoints {tmp_path}/models --plot {tmp_path}/u.png"
    data, printed = data_of(f"uptrain {text_file} {options}", tmp_path)
    assert [(row["kind"], row["start"]) for row in data["rows"]] == [
        ("MHA", "whole"), ("MQA", "mean"), ("MQA", "first"), ("MQA", "random"),
    ]  # fmt: skip
    assert (tmp_path / "u.png").read_bytes().startswith(b"\x89PNG")
    assert "mean of the group" in printed
