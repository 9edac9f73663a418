"""Generation and training with the PyTorch engine while a context is attached, by Hugging Face's own methods too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_gemma import SPLITS, attach, some_ids

from lyra.backends.torch_impl import TorchBackend

pytestmark = pytest.mark.usefixtures("one_thread")


def test_generation_stops_and_reports_each_token(torch_engine):
    ids, steps = some_ids(2, 7), []
    free = torch_engine.generate(ids, max_new_tokens=8, on_token=steps.append)
    assert free.shape == (2, 8)
    assert (np.stack(steps, axis=1) == free).all()
    stop = int(free[0, 2])
    first = [int(np.flatnonzero(row == stop)[0]) if stop in row else 8 for row in free]
    stopped = torch_engine.generate(ids, max_new_tokens=8, stop_ids=[stop])
    assert stopped.shape[1] == min(8, max(first) + 1)
    for row, whole, end in zip(stopped, free, first, strict=True):
        assert (row[: end + 1] == whole[: end + 1][: len(row)]).all()
        assert (row[end + 1 :] == stop).all()
    assert torch_engine.generate(ids, max_new_tokens=0).shape == (2, 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"cache_implementation": "static", "prefill_chunk_size": 3},
        {"num_beams": 1, "prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_hugging_faces_own_generation_works_while_attached(torch_engine, options):
    attach(torch_engine, SPLITS["cut"])
    ids = some_ids(1, 11)
    expected = torch_engine.generate(ids, max_new_tokens=7)
    made = torch_engine.module.generate(
        torch.tensor(ids), max_new_tokens=7, do_sample=False, disable_compile=True, **options
    )
    assert (made[:, 11:].numpy() == expected).all()


def test_beam_search_works_while_attached(torch_engine):
    """Every beam's score is the sum of the log-probabilities that the engine itself gives."""
    attach(torch_engine, SPLITS["cut"])
    ids = some_ids(2, 11)
    made = torch_engine.module.generate(
        torch.tensor(ids), max_new_tokens=4, num_beams=3, do_sample=False, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    own = torch_engine.log_probs(made.sequences.numpy())[:, 10:].sum(axis=1)
    np.testing.assert_allclose(made.sequences_scores.numpy(), own, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_training_with_gradient_checkpointing_works_while_attached(torch_folder):
    engine = TorchBackend().load(torch_folder)
    attach(engine, SPLITS["cut"])
    ids = torch.tensor(some_ids(2, 9))
    model = engine.module.train()
    weight = model.model.layers[2].self_attn.q_proj.weight

    def gradient():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return weight.grad.clone()

    plain = gradient()
    model.gradient_checkpointing_enable()
    assert plain.abs().max() > 0
    torch.testing.assert_close(gradient(), plain, rtol=1e-4, atol=1e-6)


def test_the_context_follows_the_module(torch_folder):
    engine = TorchBackend().load(torch_folder)
    attach(engine, SPLITS["half"])
    expected = engine.logits(some_ids(1, 8))
    module = engine.module.to(torch.bfloat16)
    assert module.model.layers[2].self_attn.static_k.dtype == torch.bfloat16
    assert module.model.layers[2].self_attn.static_v.stride(-2) == 1
    logits = engine.logits(some_ids(1, 8))
    assert logits.dtype == np.float32
    assert np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
