"""Real weights: the three global layers of Gemma-3 270M on the hidden states of a real text."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lyra.conformance.case import Problem
from lyra.conformance.judge import Judge
from lyra.conformance.premises import Premise
from lyra.conformance.properties.models import real_folder
from lyra.conformance.properties.test_identity import hugging_face
from lyra.conformance.registry import prop
from lyra.conformance.strategies import LIVE
from lyra.conformance.subject import Subject
from lyra.spec.attention import AttentionSpec
from lyra.spec.inputs import StaticLayer
from lyra.spec.reference import reference
from lyra.spec.split import HeadSplit

if TYPE_CHECKING:
    from lyra.conformance.oracles.hf_real import RealLayer

TEXT_TOKENS, CONTEXT_TOKENS = 160, 120
GLOBAL_LAYERS = (5, 11, 17)
SPLITS = {"none": (), "last two": (2, 3), "0 and 3": (0, 3), "all": (0, 1, 2, 3)}


REAL_CONTEXT = Premise(
    "a hundred tokens of a real text in the context",
    lambda problem: problem.static is not None and int(problem.static.mask.sum()) >= 100,
    names={"CONTEXT_TOKENS": 8, "TEXT_TOKENS": 12},
)


@cache
def layers() -> dict[int, RealLayer]:
    """The layers and what enters them for a text of the standard library."""
    from lyra.conformance.oracles.hf_real import real_layers
    from lyra.text import Text

    folder = real_folder()
    ids = Text.from_folder(Path(folder)).encode(topics["types"])[:TEXT_TOKENS]
    return {layer.index: layer for layer in real_layers(folder, [int(i) for i in ids])}


def problem_of(layer: RealLayer, spec: AttentionSpec) -> Problem:
    """The text's first tokens as context (the layer's own keys and values), the rest live."""
    stages = reference(spec.replace(split=None), layer.weights, layer.x, positions=layer.positions)
    heads = list(spec.lyra_kv_heads)
    k, v = (
        stages[name].value[:, :CONTEXT_TOKENS, heads].swapaxes(1, 2).astype(np.float32) for name in ("k_norm", "v_proj")
    )
    static = StaticLayer(k, v, np.ones((1, CONTEXT_TOKENS), dtype=bool), np.arange(CONTEXT_TOKENS)[None])
    live = TEXT_TOKENS - CONTEXT_TOKENS
    return Problem(
        spec,
        layer.weights,
        np.ascontiguousarray(layer.x[:, CONTEXT_TOKENS:]),
        np.arange(live)[None],
        np.ones((1, live), dtype=bool),
        static,
        (live - 1, 1),
    )


@pytest.mark.parametrize("live", LIVE)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("index", GLOBAL_LAYERS)
@prop(
    "STATIC-1",
    "SPLIT-2",
    "SPLIT-3",
    "IDENTITY-1",
    "TOLERANCE-1",
    premise=REAL_CONTEXT,
    needs=("static", "trace"),
    profile="ci",
)
def test_gemma_3_270m(judge: Judge, index: int, split: tuple[int, ...], live: str) -> None:
    """The real layers, with splits none, last two, {0, 3} and all: every stage of every backend, and Hugging Face."""
    layer = layers()[index]
    spec = layer.spec.replace(
        split=HeadSplit.from_q_heads(layer.spec, split, share_kv=None),
        static=layer.spec.static.replace(live=live),
    )
    problem = problem_of(layer, spec)
    unmodified = hugging_face().attention(spec, problem.weights)
    theirs = unmodified(problem.x, positions=problem.positions, mask=problem.mask, static=problem.static).output

    def check(subject: Subject) -> None:
        outcome = subject.run(problem, trace=True)
        subject.expect_oracle(problem, outcome)
        subject.expect_close(problem, outcome.output, theirs, "Hugging Face's attention, masked per head")
        subject.expect_stages(problem, outcome)

    judge.each(f"layer {index} of Gemma-3 270M, Lyra heads {split}, live={live!r}", check)
