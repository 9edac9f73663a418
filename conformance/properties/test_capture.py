"""Clause CAPTURE: a context is what the unmodified model's own keys and values are, however it is cut."""

from __future__ import annotations

import numpy as np
import pytest

from lyra.conformance.judge import Judge
from lyra.conformance.premises import Premise
from lyra.conformance.properties.models import engine, oracle, small_folder, static_of, tokens
from lyra.conformance.registry import prop
from lyra.conformance.strategies import LIVE
from lyra.conformance.subject import BackendError, Subject
from lyra.spec.attention import StaticSpec
from lyra.spec.split import HeadSplit

SLOTS = 29
"""Tokens captured: more than three windows of the small model."""

MANY = 75
"""Tokens of a context that is attached: more than a backend may pad every short one to."""

CHOSEN = slice(-1, None)
"""Which of the global layers are captured where not all of them are."""

CUTTING = (0, 3)
"""Lyra heads of a layer, some of each of its groups."""

LONGER_THAN_WINDOW = Premise("a text longer than the window", names={"SLOTS": 5})
CHUNKS = Premise("a context captured in several chunks", names={"SLOTS": 1})
LAYER_LEFT_OUT = Premise("a global layer that is not captured", names={"CHOSEN": slice(None)})
LONG_CONTEXT = Premise("a context of more than 64 tokens", names={"MANY": 9})
CUT_LAYER = Premise("a group is cut", names={"CUTTING": (0, 1)})


def longer_than_window(ids: np.ndarray) -> bool:
    """Whether some of the tokens [B,T] are behind the window of the small model's sliding-window layers."""
    sliding = oracle(small_folder()).spec.sliding
    return sliding is not None and ids.shape[1] > (sliding.sliding_window or 0)


@pytest.mark.parametrize("chunk", [7, 1])
@prop("CAPTURE-1", "CAPTURE-2", "STORED-1", premise=(LONGER_THAN_WINDOW, CHUNKS), needs=("model",))
def test_equals_hugging_face(judge: Judge, chunk: int) -> None:
    """Captured keys and values are those of Hugging Face's layers, at once and in chunks, past the window."""
    ids = tokens(SLOTS)
    layers = oracle(small_folder()).spec.global_layers
    wanted = oracle(small_folder()).capture(ids, layers)
    judge.meet(LONGER_THAN_WINDOW, longer_than_window(ids))
    judge.meet(CHUNKS, chunk < SLOTS)

    def check(subject: Subject) -> None:
        loaded = engine(subject, small_folder())
        for size in (SLOTS, chunk):
            found = subject.attempt(lambda size=size: loaded.capture(ids, layers, chunk_size=size))
            for layer in layers:
                subject.expect_model(found[layer].k, wanted[layer].k, f"keys of layer {layer}", "Hugging Face's k_norm")
                subject.expect_model(
                    found[layer].v, wanted[layer].v, f"values of layer {layer}", "Hugging Face's v_proj"
                )

    judge.each(f"{SLOTS} tokens in chunks of {chunk}", check)


@prop("CAPTURE-1", premise=LAYER_LEFT_OUT, needs=("model",))
def test_chosen_layers_only(judge: Judge) -> None:
    """Only the layers asked for are captured."""
    ids = tokens(9)
    layers = oracle(small_folder()).spec.global_layers
    last = layers[CHOSEN]
    judge.meet(LAYER_LEFT_OUT, len(last) < len(layers))

    def check(subject: Subject) -> None:
        loaded = engine(subject, small_folder())
        found = subject.attempt(lambda: loaded.capture(ids, last))
        subject.expect(None, tuple(found) == last, f"captured layers {tuple(found)}, asked for {last}")

    judge.each(f"layers {last}", check)


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("positions", ["continue", "overlay"])
@prop("CAPTURE-3", "STATIC-1", "SPLIT-2", premise=(LONG_CONTEXT, CUT_LAYER), needs=("model",))
def test_attached_context_equals_oracle(judge: Judge, live: str, positions: str) -> None:
    """A model with a context, captured by any backend, equals Hugging Face's with the oracle in its global layers."""
    context_ids, ids = tokens(MANY), tokens(11, seed=1, rows=2)
    judged = oracle(small_folder())
    first, last = judged.spec.global_layers
    attention = judged.spec.attention
    splits = {
        first: HeadSplit.last_kv(attention, 1),
        last: HeadSplit.from_q_heads(attention, CUTTING, share_kv=None),
    }
    mode = StaticSpec(live=live, positions=positions)  # type: ignore[arg-type]
    judge.meet(LONG_CONTEXT, MANY > 64)
    judge.meet(CUT_LAYER, bool(splits[last].cut_kv_heads))

    def check(subject: Subject) -> None:
        loaded = engine(subject, small_folder())
        for maker in judge.subjects:
            try:
                source = engine(maker, small_folder())
                captured = maker.attempt(lambda source=source: source.capture(context_ids, (first, last)))
            except BackendError:
                if maker is subject:
                    raise
                continue  # its own turn says so; the others are not to blame
            static = {layer: static_of(captured, layer, split.lyra_kv_heads) for layer, split in splits.items()}
            subject.attempt(lambda static=static: loaded.attach(static, splits, mode))
            got = subject.attempt(lambda: loaded.logits(ids))
            subject.attempt(loaded.detach)
            wanted = judged.logits_with(ids, static, splits, mode)
            subject.expect_model(got, wanted, f"logits with {maker.name}'s context", "the oracle's model")

    judge.each(f"splits {splits}, {mode}", check)


@prop("IDENTITY-1", "IDENTITY-2", premise=LONGER_THAN_WINDOW, needs=("model",))
def test_model_without_context_is_hugging_face(judge: Judge) -> None:
    """Without a context a whole model's logits are Hugging Face's, before a context was attached and after."""
    ids = tokens(SLOTS, seed=2, rows=2)
    judged = oracle(small_folder())
    wanted = judged.logits(ids)
    layer = judged.spec.global_layers[0]
    split = {layer: HeadSplit.all(judged.spec)}
    judge.meet(LONGER_THAN_WINDOW, longer_than_window(ids))

    def check(subject: Subject) -> None:
        loaded = engine(subject, small_folder())
        before = subject.attempt(lambda: loaded.logits(ids))
        subject.expect_model(before, wanted, "logits", "Hugging Face's")
        captured = subject.attempt(lambda: loaded.capture(tokens(5), (layer,)))
        static = {layer: static_of(captured, layer, split[layer].lyra_kv_heads)}
        subject.attempt(lambda: loaded.attach(static, split, StaticSpec()))
        during = subject.attempt(lambda: loaded.logits(ids))
        subject.attempt(loaded.detach)
        after = subject.attempt(lambda: loaded.logits(ids))
        subject.expect(None, bool((after == before).all()), "detaching does not give the model back, bit for bit")
        subject.expect(None, bool((during != before).any()), "attaching a context changed nothing")

    judge.each("29 tokens, 2 rows", check)
