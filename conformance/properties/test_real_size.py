"""The reference case at its real size: Gemma-3 12B's layer, 16 Q / 8 KV heads, 8 Q / 4 KV of them to Lyra."""

from __future__ import annotations

import pytest

from lyra.conformance.case import Case, Context
from lyra.conformance.judge import Judge
from lyra.conformance.premises import Premise
from lyra.conformance.properties.test_identity import hugging_face
from lyra.conformance.registry import prop
from lyra.conformance.subject import Subject
from lyra.spec.model import ModelSpec

LAYER = ModelSpec.preset("gemma-3-12b-lyra-8q4kv").attention
CASES = {
    "prefill-and-decode": Case(LAYER, calls=(5, 1), context=Context(33, start=0, hidden=(2,)), seed=1, poison=1e3),
    "rows-far-away": Case(
        LAYER.replace(static=LAYER.static.replace(live="self")),
        calls=(3,),
        batch=2,
        context=Context(64, batch=2, start=900, hidden=(0, 31)),
        start=100_000,
        flavour="peaked",
        seed=2,
        poison=1e3,
    ),
    "overlay": Case(
        LAYER.replace(static=LAYER.static.replace(live="none", positions="overlay")),
        calls=(2, 2),
        context=Context(300, gaps=True),
        flavour="offset",
        seed=3,
    ),
    "no-context": Case(LAYER, calls=(8,), batch=2, padding=(3, 0), seed=4, poison=1e3),
}


REAL_SIZE = Premise(
    "a layer of a real model's size",
    lambda problem: problem.spec.hidden_size >= 3840 and problem.spec.head_dim >= 256,
    lambda case: case.respec(hidden_size=48, head_dim=16),
)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@prop("SPLIT-1", "STATIC-1", "SPLIT-2", "IDENTITY-1", "TOLERANCE-1", premise=REAL_SIZE, needs=("static",), profile="ci")
def test_gemma_3_12b(case: Case, judge: Judge) -> None:
    """hidden 3840, head_dim 256, theta 1e6, factor 8: every backend, Hugging Face and the oracle agree."""
    problem = case.problem()
    unmodified = hugging_face().attention(problem.spec, problem.weights)
    theirs = unmodified(problem.x, positions=problem.positions, mask=problem.mask, static=problem.static).output

    def check(subject: Subject) -> None:
        outcome = subject.run(problem)
        subject.expect_oracle(problem, outcome)
        subject.expect_close(problem, outcome.output, theirs, "Hugging Face's attention, masked per head")

    judge.each(case, check)
