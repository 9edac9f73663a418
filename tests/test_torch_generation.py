"""Hugging Face's own generation on an injected Gemma-3: every feature, without a context and with one.

Without a context the oracle is the plain model, given the same options. With one it is the same model reading one token
a call, one row at a time, without padding. Prompts are longer than the sliding window.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from tiny_gemma import CUT, GLOBAL, VOCAB, make_model, random_ids
from tokenizers import Tokenizer, models
from torch.utils._python_dispatch import TorchDispatchMode
from torch_gemma import left_padded, some_ids
from transformers import DynamicCache, PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer

from lyra import Model
from lyra.backends.protocol import Sampling
from lyra.backends.torch_impl.injector import GemmaInjector
from lyra.backends.torch_impl.model import TorchEngine
from lyra.backends.torch_impl.sampling import filtered
from lyra.spec import InputError, StaticContext

pytestmark = pytest.mark.usefixtures("one_thread")

NEW = 5
DRAWN = Sampling(temperature=1.4, top_k=12, top_p=0.9)
FEATURES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 3},
    "static cache, prefill in chunks": {"cache_implementation": "static", "prefill_chunk_size": 3},
    "no cache": {"use_cache": False},
    "sampling": {"do_sample": True} | vars(DRAWN),
    "several sequences": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "beams": {"num_beams": 3},
    "all beams, static cache": {"num_beams": 3, "num_return_sequences": 3, "cache_implementation": "static"},
    "beams, prefill in chunks": {"num_beams": 2, "prefill_chunk_size": 4},
    "drawn beams": {"num_beams": 2, "do_sample": True},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(eos_token_id=None)


@pytest.fixture(scope="module")
def contexts(model: Any) -> list[StaticContext]:
    """Two contexts of different lengths, both longer than the window."""
    front = Model(TorchEngine(model, GemmaInjector(model).spec))
    return [front.capture(random_ids(1, length, seed=length)[0]) for length in (21, 14)]


PROMPTS = [random_ids(1, length, seed=length)[0] for length in (13, 10)]


@pytest.fixture(params=["shared", "one a row"])
def attached(
    request: pytest.FixtureRequest, model: Any, contexts: list[StaticContext]
) -> Iterator[list[StaticContext]]:
    """The context of each prompt, attached: the same one for both, or one of its own for each."""
    own = contexts if request.param == "one a row" else contexts[:1] * 2
    with enabled(model, StaticContext.stack(own) if request.param == "one a row" else own[0]):
        yield own


def enabled(model: Any, context: StaticContext | None) -> GemmaInjector:
    return GemmaInjector(model).enable(context, CUT)


def generate(model: Any, prompts: list[np.ndarray], **options: Any) -> Any:
    """Tokens, raw logits and processed scores of `generate` on left-padded prompts; the same draws each time."""
    ids, mask = (torch.tensor(part) for part in left_padded(prompts))
    settings = {"max_new_tokens": NEW, "do_sample": False, "length_penalty": 0.0, "disable_compile": True}
    outputs = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    torch.manual_seed(0)
    return model.generate(ids, attention_mask=mask.long(), **(settings | outputs | options))


def token_by_token(model: Any, ids: np.ndarray) -> torch.Tensor:
    """Logits [T,V] of one row that is read one token a call."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        steps = [model(input_ids=torch.tensor([[one]]), past_key_values=cache, use_cache=True) for one in ids]
    return torch.cat([step.logits[0] for step in steps])


def alone(model: Any, prompt: np.ndarray, made: np.ndarray) -> torch.Tensor:
    """Logits [N,V] from which each of the tokens made [N] was chosen, token by token."""
    return token_by_token(model, np.concatenate((prompt, made[:-1])))[len(prompt) - 1 :]


def greedy(model: Any, prompt: np.ndarray, count: int) -> np.ndarray:
    """The prompt with the most likely continuation, token by token."""
    for _ in range(count):
        prompt = np.append(prompt, token_by_token(model, prompt)[-1].argmax())
    return prompt


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_contexts_matter(model: Any, contexts: list[StaticContext]) -> None:
    """What this module compares differs from context to context, and from no context."""
    found = [alone(model, PROMPTS[0], PROMPTS[1])]
    for context in contexts:
        with enabled(model, context):
            found.append(alone(model, PROMPTS[0], PROMPTS[1]))
    for i, one in enumerate(found):
        assert all((one - other).abs().max() > 0.01 * one.abs().max() for other in found[i + 1 :])


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_without_a_context_generation_is_the_plain_models(model: Any, options: dict[str, Any]) -> None:
    plain = generate(model, PROMPTS, **options)
    with enabled(model, None):
        made = generate(model, PROMPTS, **options)
    assert torch.equal(made.sequences, plain.sequences)
    for got, expected in zip(made.logits, plain.logits, strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_with_a_context_generation_is_token_by_token(
    model: Any, contexts: list[StaticContext], attached: list[StaticContext], options: dict[str, Any]
) -> None:
    made = generate(model, PROMPTS, **options)
    each = len(made.sequences) // len(PROMPTS)
    for row, sequence in enumerate(made.sequences[:, -NEW:]):
        prompt, context = PROMPTS[row // each], attached[row // each]
        with enabled(model, context):
            expected = alone(model, prompt, sequence.numpy())
        if "num_beams" in options:
            total = expected.log_softmax(dim=-1).gather(1, sequence[:, None]).sum()
            torch.testing.assert_close(made.sequences_scores[row], total, rtol=0, atol=1e-4)
            continue
        assert_close(torch.stack([step[row] for step in made.logits]), expected)
        if "temperature" in options:
            drawn = torch.stack([step[row] for step in made.scores]).softmax(dim=-1)
            torch.testing.assert_close(drawn, filtered(expected, DRAWN).softmax(dim=-1), rtol=1e-3, atol=1e-6)
        elif "do_sample" not in options:
            assert torch.equal(sequence, expected.argmax(dim=-1))


def test_beams_are_those_of_a_search_without_a_cache(model: Any, attached: list[StaticContext]) -> None:
    made = generate(model, PROMPTS, num_beams=2, num_return_sequences=2, max_new_tokens=3).sequences[:, -3:].tolist()
    for row, (prompt, context) in enumerate(zip(PROMPTS, attached, strict=True)):
        with enabled(model, context):
            assert made[2 * row : 2 * row + 2] == literal_beams(model, prompt, beams=2, count=3)


def literal_beams(model: Any, prompt: np.ndarray, beams: int, count: int) -> list[list[int]]:
    """The continuations that beam search ends with, the best first; every one is read again at every step."""
    found: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(count):
        grown = []
        for score, made in found:
            last = token_by_token(model, np.append(prompt, made).astype(int))[-1].log_softmax(dim=-1)
            grown += [(score + one, [*made, token]) for token, one in enumerate(last.tolist())]
        found = sorted(grown, reverse=True)[:beams]
    return [made for _, made in found]


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that is made, views of what an operation is given aside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, made.numel())
        return made


def test_beams_share_the_context_of_their_prompt(model: Any) -> None:
    """A step makes nothing as large as the two contexts, let alone one for each of the eight rows."""
    front = Model(TorchEngine(model, GemmaInjector(model).spec))
    context = StaticContext.stack([front.capture(random_ids(1, 300, seed=seed)[0]) for seed in (1, 2)])
    cache, rows = DynamicCache(config=model.config), torch.tensor(random_ids(2, 1)).repeat_interleave(4, dim=0)
    with enabled(model, context), torch.no_grad(), LargestTensor() as largest:
        model(input_ids=rows, past_key_values=cache)
    assert 0 < largest.elements < context.layers[GLOBAL[0]].k.size


def test_rows_that_cannot_be_told_apart_are_refused(model: Any, contexts: list[StaticContext]) -> None:
    with (
        enabled(model, StaticContext.stack(contexts)),
        pytest.raises(InputError, match=r"the context holds 2 rows and the call 3; attach a context of one row"),
    ):
        generate(model, [*PROMPTS, PROMPTS[0]])


# the engine's own loop


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


# helpers that guess: the answer stays the target's own


@pytest.mark.parametrize("guess", ["small assistant", "prompt lookup", "the plain model", "the same model"])
def test_assisted_decoding_of_a_target_with_a_context(model: Any, contexts: list[StaticContext], guess: str) -> None:
    helpers = {
        "small assistant": lambda: {"assistant_model": make_model(3, intermediate_size=16, eos_token_id=None)},
        "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
        "the plain model": lambda: {"assistant_model": make_model(eos_token_id=None)},
        "the same model": lambda: {"assistant_model": make_model(eos_token_id=None)},
    }
    options, count = helpers[guess](), 12
    plain = generate(model, PROMPTS[:1], max_new_tokens=count).sequences[0]
    with enabled(model, None):
        assert torch.equal(generate(model, PROMPTS[:1], max_new_tokens=count, **options).sequences[0], plain)
    if guess == "the same model":
        enabled(options["assistant_model"], contexts[0])
    calls: list[int] = []
    with enabled(model, contexts[0]):
        expected = greedy(model, PROMPTS[0], count)
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        made = generate(model, PROMPTS[:1], max_new_tokens=count, **options).sequences[0]
        hook.remove()
    assert made.tolist() == expected.tolist() != plain.tolist()
    if guess == "the same model":
        assert len(calls) < count / 2


def test_assisted_decoding_by_an_assistant_with_a_context(model: Any, contexts: list[StaticContext]) -> None:
    target = make_model(5, eos_token_id=None)
    plain = generate(target, PROMPTS[:1], max_new_tokens=12).sequences
    with enabled(model, contexts[0]):
        assert torch.equal(generate(target, PROMPTS[:1], max_new_tokens=12, assistant_model=model).sequences, plain)


# text as it comes


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))


def test_text_streams(
    model: Any, contexts: list[StaticContext], tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for context in (None, contexts[0]):
        with enabled(model, context):
            expected = tokenizer.decode(greedy(model, PROMPTS[0], NEW)[-NEW:])
            generate(model, PROMPTS[:1], streamer=TextStreamer(tokenizer, skip_prompt=True))
            assert capsys.readouterr().out == expected + "\n"
            pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
            worker = Thread(target=generate, args=(model, PROMPTS[:1]), kwargs={"streamer": pieces})
            worker.start()
            found = list(pieces)
            worker.join()
            assert "".join(found) == expected
            assert len([piece for piece in found if piece]) == NEW
