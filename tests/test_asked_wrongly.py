"""Bad input to the calls of a whole model: one InputError at the door, in the same words from both backends."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lyra
from lyra import HeadSplit, InputError, Model, StaticContext
from lyra.backends.protocol import Sampling
from lyra.spec.arguments import LAST_POSITION

TEXT = "the hand and"
IDS = [2, 270, 271]
DRAW = {"temperature": 1.0}


@pytest.fixture(scope="module")
def model(backend: str, tiny_folder: Path) -> Model:
    return lyra.load(tiny_folder, backend=backend)


@pytest.fixture(scope="module")
def blocks(backend: str, tiny_folder: Path) -> Model:
    made = lyra.load(tiny_folder, backend=backend, mode="sequential")
    made.attach(made.capture(IDS))
    return made


class Odd:
    """Somebody's object, whose text cannot be had."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


def refused(call: Callable[[], Any], message: str) -> None:
    """The call raises InputError and nothing else, with this text somewhere in it, in one line."""
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


NO_TEXT: dict[str, tuple[Any, str]] = {
    "surrogate": ("the \udc80 hand", "holds '\\udc80' at character 4, half of a surrogate pair"),
    "half an emoji": ("\ud83d", "holds '\\ud83d' at character 0"),
    "bytes": (b"the hand", "b'the hand'"),
    "None": (None, "None"),
    "number": (5, "is 5"),
    "float": (1.5, "1.5"),
    "flag": (True, "True"),
    "object": (Odd(), "<Odd instance at "),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_a_prompt_that_is_no_text(model: Model, name: str) -> None:
    prompt, message = NO_TEXT[name]
    for call in (model.generate, model.stream):
        refused(lambda call=call: call(prompt, 3), message)
    if not isinstance(prompt, list):
        refused(lambda: model.generate([TEXT, prompt], 3), "prompt 1 ")


def test_prompts_that_are_none(model: Model) -> None:
    refused(lambda: model.generate(IDS, 3), "prompt 0 is 2; expected a text (str)")
    refused(lambda: model.generate({"a": 1}, 3), "prompt is {'a': 1}; expected a text (str) or a list of texts")
    refused(lambda: model.stream([TEXT], 3), "expected one text (str), which is what can be streamed")


@pytest.mark.parametrize("name", [name for name in NO_TEXT if name not in {"number"}])
@pytest.mark.parametrize("call", ["logits", "score", "capture"])
def test_a_text_that_is_none(model: Model, name: str, call: str) -> None:
    refused(lambda: getattr(model, call)(NO_TEXT[name][0]), NO_TEXT[name][1])


VOCABULARY = 279
BAD_IDS: dict[str, tuple[Any, str]] = {
    "ragged": ([[2, 3], [4]], "ids are [[2, 3], [4]]; expected a text or whole numbers"),
    "floats": ([2.0, 3.0], "ids are of shape (2,) and dtype float64; expected a text or whole numbers"),
    "one float": ([2, 3.5], "ids are of shape (2,) and dtype float64"),
    "NaN": (np.array([np.nan, 2]), "dtype float64"),
    "flags": ([True, False], "with True or False among them"),
    "a flag": ([2, True, 3], "ids are [2, True, 3], with True or False among them"),
    "empty": ([], "ids are of shape (0,); expected"),
    "empty rows": (np.zeros((2, 0), int), "ids are of shape (2, 0); expected"),
    "no axes": (np.array(3), "ids are array(3); expected"),
    "number": (3, "ids are 3; expected"),
    "three axes": (np.zeros((1, 2, 3), int), "ids are of shape (1, 2, 3) and dtype int64"),
    "texts": ([["a", "b"]], "dtype <U1"),
    "None among them": ([2, None], "dtype object"),
    "negative": ([2, -1], f"ids range from -1 to 2; the vocabulary has ids 0 to {VOCABULARY - 1}"),
    "beyond": ([2, VOCABULARY], f"ids range from 2 to {VOCABULARY}; the vocabulary has ids 0 to {VOCABULARY - 1}"),
    "beyond 32 bits": ([2, 2**40], f"ids range from 2 to {2**40}"),
    "beyond 64 bits": ([2, 2**64], f"ids range from 2 to {2**64}"),
    "far beyond": ([2, -(10**30)], "ids range from -10000000000000"),
    "unsigned": (np.array([2, 2**63], np.uint64), f"ids range from 2 to {2**63}"),
}


@pytest.mark.parametrize("name", BAD_IDS)
@pytest.mark.parametrize("call", ["logits", "score", "capture"])
def test_ids_that_are_none(model: Model, name: str, call: str) -> None:
    ids, message = BAD_IDS[name]
    refused(lambda: getattr(model, call)(ids), message)


@pytest.mark.parametrize("name", BAD_IDS)
def test_an_engine_by_itself_has_the_same_door(model: Model, name: str) -> None:
    ids, message = BAD_IDS[name]
    engine, message = model.engine, message.replace("a text or ", "")
    if np.ndim(np.array(ids, dtype=object)) == 1:
        ids = [ids]  # a row, as engines take it
        message = message.replace(" are [", " are [[").replace("(2,)", "(1, 2)").replace("(0,)", "(1, 0)")
    for call in (engine.logits, engine.log_probs, lambda ids: engine.generate(ids, max_new_tokens=1)):
        with pytest.raises(InputError):
            call(ids)
    if not isinstance(ids, list) or name in {"negative", "beyond"}:
        refused(lambda: engine.logits(ids), message)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((1, 4), bool), "mask has shape (1, 4) and dtype bool; expected bool (1, 3)"),
        (np.ones((1, 3), int), "mask has shape (1, 3) and dtype int64; expected bool (1, 3)"),
        (np.ones((1, 3)), "dtype float64"),
        ([[True], [True, False]], "mask is [[True], [True, False]]; expected True and False of shape (1, 3)"),
        ("all", "mask has shape () and dtype <U3"),
        (True, "mask has shape () and dtype bool"),
        ([None, True, True], "dtype object"),
    ],
    ids=str,
)
def test_masks_that_are_none(model: Model, mask: Any, message: str) -> None:
    refused(lambda: model.logits(IDS, mask), message)


def test_a_mask_of_one_row_needs_no_second_axis(model: Model) -> None:
    mask = [False, True, True]
    np.testing.assert_array_equal(model.logits(IDS, mask), model.logits([IDS], [mask])[0])


COUNT = "how many tokens to generate at most"
BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "half a token": ({"max_new_tokens": 1.5}, f"max_new_tokens is 1.5; expected {COUNT}"),
    "a whole float": ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0"),
    "no number": ({"max_new_tokens": None}, f"max_new_tokens is None; expected {COUNT}"),
    "digits": ({"max_new_tokens": "5"}, "max_new_tokens is '5'"),
    "a flag": ({"max_new_tokens": True}, "max_new_tokens is True"),
    "NaN tokens": ({"max_new_tokens": float("nan")}, "max_new_tokens is nan"),
    "negative": ({"max_new_tokens": -1}, f"max_new_tokens is -1; expected {COUNT}, 0 or more"),
    "endless": ({"max_new_tokens": 10**20 - 1}, f"max_new_tokens is {10**20 - 1}; behind a prompt of"),
    "too many": ({"max_new_tokens": LAST_POSITION + 1}, "tokens there are positions for 1310"),
    "seed of another type": ({**DRAW, "seed": 1.0}, "seed is 1.0; expected 0 to 4294967295, a whole number"),
    "seed too large": ({**DRAW, "seed": 2**32}, "seed is 4294967296; expected 0 to 4294967295"),
    "negative seed": ({**DRAW, "seed": np.int64(-1)}, "-1); expected 0 to 4294967295"),
    "seed as text": ({**DRAW, "seed": "1"}, "seed is '1'"),
    "seed as flag": ({**DRAW, "seed": True}, "seed is True"),
    "temperature as text": ({"temperature": "1"}, "temperature is '1'; expected a finite number from 1e-06 up"),
    "no temperature": ({"temperature": None}, "temperature is None"),
    "NaN": ({"temperature": float("nan")}, "temperature is nan; expected a finite number from 1e-06 up"),
    "infinite": ({"temperature": float("-inf")}, "temperature is -inf"),
    "beyond floats": ({"temperature": 10**400}, "; expected a finite number from 1e-06 up"),
    "temperature as flag": ({"temperature": False}, "temperature is False"),
    "temperatures": ({"temperature": np.ones(2)}, "temperature is an array of shape (2,) and dtype float64"),
    "complex": ({"temperature": 1j}, "temperature is 1j"),
    "top_k as float": ({**DRAW, "top_k": 5.0}, "top_k is 5.0; expected the number of tokens to choose from, 1 or more"),
    "top_k as text": ({**DRAW, "top_k": "5"}, "top_k is '5'"),
    "top_k as flag": ({**DRAW, "top_k": True}, "top_k is True"),
    "negative top_k": ({**DRAW, "top_k": -3}, "top_k is -3"),
    "top_p as text": ({**DRAW, "top_p": "0.5"}, "top_p is '0.5'; expected a probability above 0, at most 1"),
    "NaN top_p": ({**DRAW, "top_p": float("nan")}, "top_p is nan; expected a probability above 0, at most 1"),
    "no chance": ({**DRAW, "top_p": 0}, "top_p is 0; expected a probability above 0, at most 1"),
    "negative top_p": ({**DRAW, "top_p": -0.1}, "top_p is -0.1"),
    "a little above": ({**DRAW, "top_p": np.nextafter(1, 2)}, "expected a probability above 0, at most 1"),
    "on_text": ({"on_text": "print"}, "on_text is 'print'; expected a function, or None"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_a_generation_that_cannot_be(model: Model, name: str) -> None:
    options, message = BAD_OPTIONS[name]
    refused(lambda: model.generate(TEXT, **{"max_new_tokens": 3, **options}), message)
    if name not in {"on_text", "endless", "too many"}:
        refused(lambda: model.stream(TEXT, **{"max_new_tokens": 3, **options}), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"max_new_tokens": 10**30}, "behind a prompt of 3 tokens there are positions for 131070 more (clause ROPE-3)"),
        ({"seed": -1}, "seed is -1; expected 0 to 4294967295"),
        ({"seed": None}, "seed is None"),
        ({"stop_ids": 5}, "stop_ids is 5; expected a list of whole numbers"),
        ({"stop_ids": [1.0]}, "stop_ids holds 1.0; expected whole numbers from 0 up"),
        ({"sampling": 0.7}, "sampling is 0.7; expected a Sampling, or None for the most likely token"),
        ({"on_token": 5}, "on_token is 5; expected a function, or None"),
    ],
    ids=str,
)
def test_a_generation_that_an_engine_refuses(model: Model, options: dict[str, Any], message: str) -> None:
    refused(lambda: model.engine.generate([IDS], **{"max_new_tokens": 1, **options}), message)


def test_numbers_of_numpy_are_numbers(model: Model) -> None:
    options = {"temperature": 2.0, "top_k": 7, "top_p": 0.75, "seed": 5}
    of_numpy = {
        "temperature": np.float32(2), "top_k": np.int64(7), "top_p": np.float16(0.75), "seed": np.uint32(5)
    }  # fmt: skip
    if type(model.engine).__name__ == "TorchEngine":  # what an engine gets is the same in both
        assert model.generate(TEXT, np.int16(6), **of_numpy) == model.generate(TEXT, 6, **options)
    assert Sampling(np.float64(2), np.int8(7), np.float32(0.75)) == Sampling(2.0, 7, 0.75)
    assert type(Sampling(np.int32(1), np.int8(7)).temperature) is float


def test_no_tokens_are_no_text(model: Model) -> None:
    steps: list[Any] = []
    assert model.generate(TEXT, 0) == ""
    assert list(model.stream(TEXT, 0)) == []
    assert model.generate([TEXT, "a"], 0, on_text=None) == ["", ""]
    assert model.engine.generate([IDS], max_new_tokens=0, on_token=steps.append).shape == (1, 0)
    assert steps == []


BAD_CAPTURES: dict[str, tuple[dict[str, Any], str]] = {
    "no chunk": ({"chunk_size": 0}, "chunk_size is 0; expected how many tokens are captured at once"),
    "half a chunk": ({"chunk_size": 1.5}, "chunk_size is 1.5"),
    "None": ({"chunk_size": None}, "chunk_size is None"),
    "a flag": ({"chunk_size": True}, "chunk_size is True"),
    "one layer": ({"layers": 1}, "layers is 1; expected a list of whole numbers"),
    "layers as text": ({"layers": "13"}, "layers is '13'; expected a list of whole numbers"),
    "layers as floats": ({"layers": [1.0]}, "layers holds 1.0; expected whole numbers from 0 up"),
    "negative layer": ({"layers": [-1]}, "layers holds -1; expected whole numbers from 0 up"),
    "no layers": ({"layers": []}, "name nothing to keep; give at least one layer"),
    "sliding": ({"layers": [0, 1]}, "layers [0] are not global; the global layers are [1, 3]"),
    "far layer": ({"layers": [10**12]}, "are not global"),
    "one head": ({"kv_heads": 1}, "kv_heads is 1; expected a list of whole numbers"),
    "heads as text": ({"kv_heads": "01"}, "kv_heads is '01'"),
    "another head": ({"kv_heads": [0, 2]}, "kv_heads are [2]; the layers have KV heads 0 to 1"),
    "no heads": ({"kv_heads": []}, "name nothing to keep"),
    "no heads of a layer": ({"kv_heads": {1: [], 3: [0]}}, "name nothing to keep"),
    "head of a layer": ({"kv_heads": {1: 0}}, "kv_heads is 0; expected a list of whole numbers"),
    "heads of a sliding layer": ({"kv_heads": {0: [0]}}, "layers [0] are not global"),
    "heads elsewhere": ({"layers": [1], "kv_heads": {3: [0]}}, "kv_heads names layers [3]; those that are captured"),
    "progress": ({"on_progress": 1}, "on_progress is 1; expected a function, or None"),
    "split": ({"split": 5}, "split is 5; expected a HeadSplit"),
    "split by layer": ({"split": {1: "half"}}, "split of layer 1 is 'half'; expected a HeadSplit"),
    "split of layers": ({"split": {"1": HeadSplit((0, 1))}}, "a layer of split is '1'; expected a whole number"),
}


@pytest.mark.parametrize("name", BAD_CAPTURES)
def test_a_capture_that_cannot_be(model: Model, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, message = BAD_CAPTURES[name]
    monkeypatch.setattr(type(model.engine), "capture", lambda *_, **__: pytest.fail("the model ran"))
    refused(lambda: model.capture(IDS, **options), message)


def test_a_chunk_may_be_larger_than_any_text(model: Model) -> None:
    whole, chunked = model.capture(IDS), model.capture(IDS, chunk_size=10**30)
    np.testing.assert_array_equal(whole.layers[1].k, chunked.layers[1].k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": None}, "context is None; expected a StaticContext or the path of its file"),
        ({"context": b"book.safetensors"}, "context is b'book.safetensors'"),
        ({"context": 5}, "context is 5"),
        ({"context": "a\0b"}, "context is 'a\\x00b'"),
        ({"context": ""}, "context is ''"),
        ({"split": 5}, "split is 5; expected a HeadSplit, one for each layer, a file or a preset's name"),
        ({"split": [2, 3]}, "split is [2, 3]"),
        ({"split": {1: (2, 3)}}, "split of layer 1 is (2, 3); expected a HeadSplit"),
        ({"override": "no"}, "override is 'no'; expected True or False"),
        ({"override": 1}, "override is 1; expected True or False"),
    ],
    ids=str,
)
def test_what_cannot_be_attached(model: Model, options: dict[str, Any], message: str) -> None:
    context = model.capture(IDS)
    refused(lambda: model.attach(**{"context": context, **options}), message)
    assert model.context is None


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("half", "gate is 'half'; expected a finite number"),
        (None, "gate is None"),
        (True, "gate is True"),
        (float("nan"), "gate is nan"),
        (np.inf, "gate is inf"),
        ({1: 0.5, 3: "a"}, "gate of layer 3 is 'a'; expected a finite number"),
    ],
    ids=str,
)
def test_gates_that_are_none(blocks: Model, gate: Any, message: str) -> None:
    before = blocks.gate
    refused(lambda: setattr(blocks, "gate", gate), message)
    if gate is not None:
        refused(lambda: blocks.attach(blocks.context, gate=gate), message)
    refused(lambda: blocks.attach(blocks.context, residual=0), "residual is 0; expected True or False")
    assert blocks.gate == before


def test_a_refusal_leaves_the_context_as_it_was(model: Model) -> None:
    context: StaticContext = model.capture(IDS)
    model.attach(context)
    try:
        refused(lambda: model.attach(context, split=5), "split is 5")
        assert model.context is context
    finally:
        model.detach()
