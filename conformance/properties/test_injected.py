"""Clause SEQUENTIAL in whole models: a block behind the self-attention of each global layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lyra.backends.protocol import SequentialEngine
from lyra.conformance.judge import Judge
from lyra.conformance.premises import Premise
from lyra.conformance.properties.models import engine, oracle, small_folder, static_of, tokens
from lyra.conformance.registry import prop
from lyra.conformance.subject import Subject
from lyra.conformance.tolerance import MODEL
from lyra.spec.attention import StaticSpec
from lyra.spec.inputs import StaticLayer
from lyra.spec.sequential import SequentialSpec
from lyra.spec.split import HeadSplit

if TYPE_CHECKING:
    from lyra.conformance.oracles.hf_model import ModelOracle

SLOTS, NEW, POISON = 13, 5, 1e9
KINDS: dict[str, dict[str, Any]] = {
    "every head": {"gate": 0.7},
    "some heads": {"heads": (0, 3), "live": "causal", "gate": -0.5, "residual": False},
    "no outer norm": {"live": "self", "positions": "overlay", "gate": 0.1, "output_norm": False},
    "own keys": {"source": "own", "gate": 0.7},
}


OPEN = Premise(
    "a gate that is open",
    names={"KINDS": {kind: options | {"gate": 0.0, "residual": True} for kind, options in KINDS.items()}},
)


def blocks_for(
    judged: ModelOracle,
    *,
    heads: tuple[int, ...] | None = None,
    live: str = "none",
    positions: str = "continue",
    **rest: Any,
) -> tuple[dict[int, StaticLayer], dict[int, SequentialSpec]]:
    """A block for each global layer, and a captured context for each that reads one, a slot of it hidden."""
    spec, layers = judged.spec, judged.spec.global_layers
    if rest.get("source") == "own":
        return {}, {layer: SequentialSpec.for_layer(spec.layer(layer), **rest) for layer in layers}
    split = HeadSplit.all(spec) if heads is None else HeadSplit.from_q_heads(spec.attention, heads, share_kv=True)
    mode = StaticSpec(live=live, positions=positions)  # type: ignore[arg-type]
    blocks = {
        layer: SequentialSpec(
            attention=spec.layer(layer).replace(split=split, static=mode), norm_eps=spec.rms_norm_eps, **rest
        )
        for layer in layers
    }
    captured = judged.capture(tokens(SLOTS), layers)
    static = {layer: static_of(captured, layer, block.attention.lyra_kv_heads) for layer, block in blocks.items()}
    for context in static.values():
        context.mask[:, 4] = False
        context.k[:, :, 4] = context.v[:, :, 4] = POISON
    return static, blocks


@pytest.mark.parametrize("kind", KINDS)
@prop("SEQUENTIAL-1", "SEQUENTIAL-4", "SEQUENTIAL-5", "SEQUENTIAL-7", premise=OPEN, needs=("model", "inject"))
def test_model_with_blocks_equals_oracle(judge: Judge, kind: str) -> None:
    """Logits and greedy tokens are Hugging Face's with the oracle's blocks, and without blocks its own again."""
    ids, judged = tokens(11, seed=1, rows=2), oracle(small_folder())
    static, blocks = blocks_for(judged, **KINDS[kind])
    other = {layer: block.replace(gate=block.gate / 2) for layer, block in blocks.items()}
    judge.meet(OPEN, all(block.gate != 0 for block in blocks.values()))
    wanted, regated = (judged.logits_injected(ids, static, given) for given in (blocks, other))

    def check(subject: Subject) -> None:
        loaded = engine(subject, small_folder())
        subject.expect(None, isinstance(loaded, SequentialEngine), "its engine is no SequentialEngine")
        plain = subject.attempt(lambda: loaded.logits(ids))
        subject.attempt(lambda: loaded.inject(static, blocks))
        got = subject.attempt(lambda: loaded.logits(ids))
        subject.expect_model(got, wanted, "logits with blocks", "the oracle's model")
        new = subject.attempt(lambda: loaded.generate(ids, max_new_tokens=NEW))
        subject.expect(None, new.shape == (len(ids), NEW), f"{new.shape} tokens, asked for {NEW} in {len(ids)} rows")
        whole = np.concatenate([ids, new], axis=1)
        scores = judged.logits_injected(whole, static, blocks)[:, -NEW - 1 : -1]
        chosen = np.take_along_axis(scores, new[:, :, None], axis=2)[:, :, 0]
        best = bool((chosen >= scores.max(axis=2) - MODEL * np.abs(scores).max()).all())
        subject.expect(None, best, f"greedy tokens {new.tolist()} are not the most likely ones")
        subject.attempt(lambda: loaded.set_gates({layer: block.gate for layer, block in other.items()}))
        got = subject.attempt(lambda: loaded.logits(ids))
        subject.expect_model(got, regated, "logits with other gates", "the oracle's model")
        subject.attempt(loaded.detach)
        after = subject.attempt(lambda: loaded.logits(ids))
        subject.expect(None, bool((after == plain).all()), "taking the blocks out does not give the model back")

    judge.each(kind, check)
