"""Clause SPLIT in whole models whose heads have blends: what `lyra choose` measures is what a split gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lyra.backends.protocol import blended_text
from lyra.conformance.judge import Judge
from lyra.conformance.premises import Premise
from lyra.conformance.properties.models import engine, oracle, small_folder, static_of, tokens
from lyra.conformance.registry import prop
from lyra.conformance.subject import Subject
from lyra.spec.attention import StaticSpec
from lyra.spec.split import HeadSplit

if TYPE_CHECKING:
    from lyra.conformance.oracles.hf_model import ModelOracle

SLOTS, TEXT, SCORED = 13, 17, 6


def choices(layers: int, heads: int) -> np.ndarray:
    """Which heads are Lyra heads, bool [C,L,Hq], in six ways: none, all, and some."""
    chosen = np.random.default_rng(0).integers(0, 2, (6, layers, heads)).astype(bool)
    chosen[0], chosen[1] = False, True
    return chosen


BOTH_KINDS = Premise(
    "heads of both kinds in a layer", names={"choices": lambda layers, heads: np.ones((6, layers, heads), bool)}
)


def nll_of_split(judged: ModelOracle, ids: np.ndarray, captured: Any, chosen: np.ndarray) -> float:
    """Mean NLL in nats of the last SCORED of ids [1,T], the heads in `chosen`, bool [L,Hq], being Lyra heads."""
    splits = {
        layer: HeadSplit.from_q_heads(judged.spec.attention, tuple(np.flatnonzero(heads).tolist()), share_kv=None)
        for layer, heads in zip(judged.spec.global_layers, chosen, strict=True)
        if heads.any()
    }
    static = {layer: static_of(captured, layer, split.lyra_kv_heads) for layer, split in splits.items()}
    scores = judged.logits_with(ids, static, splits, StaticSpec())[0, -SCORED - 1 : -1].astype(np.float64)
    return float((np.logaddexp.reduce(scores, axis=1) - scores[np.arange(SCORED), ids[0, -SCORED:]]).mean())


@prop("SPLIT-2", "SPLIT-4", "STATIC-1", premise=BOTH_KINDS, needs=("model", "blends"))
def test_blends_of_one_and_zero_are_a_split(judge: Judge) -> None:
    """A blend of 1 makes a Lyra head, one of 0 a vanilla head: the NLL of a text is the oracle's for any such heads."""
    judged, ids = oracle(small_folder()), tokens(TEXT, seed=3)
    layers, query_heads = judged.spec.global_layers, judged.spec.num_attention_heads
    captured = judged.capture(tokens(SLOTS), layers)
    static = {layer: static_of(captured, layer, tuple(range(judged.spec.num_key_value_heads))) for layer in layers}
    chosen = choices(len(layers), query_heads)
    judge.meet(BOTH_KINDS, bool((chosen.any(axis=-1) & ~chosen.all(axis=-1)).any()))
    wanted = np.array([nll_of_split(judged, ids, captured, heads) for heads in chosen])

    def check(subject: Subject) -> None:
        loaded = engine(subject, small_folder())
        text = subject.attempt(lambda: blended_text(loaded, ids, SCORED, static))
        got = subject.attempt(lambda: text.nll(chosen.astype(np.float32)))
        subject.expect_model(got, wanted, "NLL of a text", "the oracle's model with these heads")
        value, slope = subject.attempt(lambda: text.gradient(chosen[2].astype(np.float32)))
        subject.expect_model(np.array(value), wanted[2], "NLL beside its gradient", "the oracle's model")
        subject.expect(None, slope.shape == chosen[2].shape, f"the gradient has shape {slope.shape}")

    judge.each(f"heads {chosen.astype(int).tolist()}", check)
