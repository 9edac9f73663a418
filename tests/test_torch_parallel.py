"""Several processes, one model: contexts sharded over the sequence, and heads over ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ranks import CASES, HEADS, SPLITS, answers, attached, cotangent_of, run_ranks, weight_gradients
from tiny_gemma import assert_close, make_model, random_context

from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.backends.torch_impl.tensor_parallel import Share
from lyra.conformance.tolerance import K, distance
from lyra.spec import HeadSplit, InputError, ModelSpec
from lyra.spec.gradients import gradients
from lyra.spec.reference import reference

Ranks = list[dict[str, dict[str, np.ndarray]]]
TOKENS = 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and a context for it."""
    path = tmp_path_factory.mktemp("ranks")
    model = make_model(**HEADS)
    model.save_pretrained(path)
    random_context(GemmaInjector(model), range(4), TOKENS).save(path / "context.safetensors")
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Ranks:
    return run_ranks(folder)


@pytest.fixture(scope="module")
def single(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """What one process gives, without a context and with it by each split."""
    model = make_model(**HEADS)
    found = {"plain": answers(model)}
    for name in SPLITS:
        with attached(model, str(folder / "context.safetensors"), name):
            found[name] = answers(model) | weight_gradients(model)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_sharded_context_gives_the_unsharded_result(ranks: Ranks, name: str) -> None:
    """Within K·σ of the oracle, which has the whole context, and the same bits in every process."""
    problem = CASES[name].problem()
    wanted = reference(
        problem.spec, problem.weights, problem.x, positions=problem.positions, mask=problem.mask, static=problem.static
    )["output"]
    for rank in ranks:
        far = distance(rank[name]["output"], wanted, problem.real)
        assert far.ratio <= K, far.describe("output", K)
        np.testing.assert_array_equal(rank[name]["output"], ranks[0][name]["output"])


@pytest.mark.parametrize("name", CASES)
def test_gradients_through_a_sharded_context(ranks: Ranks, name: str) -> None:
    """Inputs and weights get the whole gradient in every process, each slot its own in the process that holds it."""
    problem = CASES[name].problem()
    wanted = gradients(
        problem.spec, problem.weights, cotangent_of(CASES[name]), problem.x,
        positions=problem.positions, mask=problem.mask, static=problem.static,
    )  # fmt: skip
    assert problem.static is not None
    assert wanted.static_k is not None
    assert wanted.static_v is not None
    slots = {"static_k": wanted.static_k, "static_v": wanted.static_v}
    for rank in ranks:
        for of, expected in {"x": wanted.x, **wanted.weights}.items():
            far = distance(rank[name][of], expected)
            assert far.ratio <= K, far.describe(of, K)
    for of, expected in slots.items():
        parts = [rank[name][of] for rank in ranks]
        held = [part.any(axis=(1, 3)) for part in parts]
        assert not np.logical_and(*held).any()
        far = distance(np.add(*parts), expected)
        assert far.ratio <= K, far.describe(of, K)


@pytest.mark.parametrize("name", ["plain", *SPLITS])
def test_tensor_parallel_gives_the_single_process_logits(ranks: Ranks, single, name: str) -> None:
    for rank in ranks:
        for key, expected in single[name].items():
            assert_close(rank[f"heads, {name}"][key], expected)
        np.testing.assert_array_equal(rank[f"heads, {name}"]["made"], single[name]["made"])
    differs = np.abs(single[name]["logits"] - single["plain"]["logits"]).max()
    assert (differs > 0.1) == (name != "plain")


def test_a_tensor_parallel_model_is_what_it_was_when_disabled(ranks: Ranks) -> None:
    for rank in ranks:
        np.testing.assert_array_equal(rank["heads, plain again"]["logits"], rank["heads, plain"]["logits"])


@pytest.mark.parametrize("name", SPLITS)
def test_a_model_with_a_sharded_context_gives_the_single_process_logits(ranks: Ranks, single, name: str) -> None:
    for rank in ranks:
        got = rank[f"slots, {name}"]
        for key, expected in single[name].items():
            assert_close(got[key], expected)
        np.testing.assert_array_equal(got["made"], single[name]["made"])
        np.testing.assert_array_equal(got["logits"], ranks[0][f"slots, {name}"]["logits"])
    assert sum(rank[f"slots, {name}"]["held"][2] for rank in ranks) == TOKENS


def test_what_needs_all_heads_is_refused(ranks: Ranks) -> None:
    wanted = {
        "slots too": "ranks [0, 1] have different heads",
        "trainable": "tuned in one piece",
        "capture": "capture: a context needs all heads",
        "attach": "inject: a block needs all heads",
    }
    for rank in ranks:
        for what, message in wanted.items():
            assert message in str(rank["heads, refused"][what])


def test_heads_that_cannot_be_dealt_out_are_refused() -> None:
    spec = ModelSpec.preset("gemma-3-270m").attention
    with pytest.raises(InputError, match="over 2 ranks: 1 KV heads cannot be dealt out evenly"):
        Share(0, (0, 1)).own_layer(spec.replace(split=HeadSplit.all(spec)))
