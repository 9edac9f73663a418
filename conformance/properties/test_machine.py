"""Clauses LIVE and BATCH over a whole life of a cache: Hypothesis decides what happens to it, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lyra.conformance.case import Case, Context, Problem
from lyra.conformance.frames import SMALLEST
from lyra.conformance.judge import Judge
from lyra.conformance.registry import prop
from lyra.conformance.session import current
from lyra.conformance.strategies import attention_specs, seeds
from lyra.conformance.subject import Subject

ROWS, LONGEST, SLOTS = 2, 14, 7
FRAME = SMALLEST.replace(heads=(4, 2), batch=ROWS)


class CacheMachine(RuleBasedStateMachine):
    """One layer, its live tokens so far, the context attached now, and every backend's cache."""

    judge: Judge

    @initialize(spec=attention_specs(FRAME), seed=seeds())
    def begin(self, spec: Any, seed: int) -> None:
        """A layer with its weights and no live tokens."""
        self.steps = [f"layer {spec.lyra_q_heads}, {spec.static}, seed {seed}"]
        self.problem = Case(spec, calls=(LONGEST,), batch=ROWS, seed=seed).problem()
        self.reset()

    @rule()
    def reset(self) -> None:
        """Forget all live tokens; the context stays."""
        self.steps.append("reset")
        self.x = self.problem.x[:, :0]
        self.mask = self.problem.mask[:, :0]
        self.caches: dict[str, Any] = {}

    @rule(kind=st.sampled_from(["shared", "rows"]), hidden=st.integers(0, SLOTS), seed=seeds())
    def attach(self, kind: str, hidden: int, seed: int) -> None:
        """Attach a context, or put another in the place of the one that is there."""
        self.steps.append(f"attach {kind} context, {hidden} slots hidden in its first row")
        rows = 1 if kind == "shared" else ROWS
        context = Context(SLOTS, batch=rows, start=seed % 50, hidden=(hidden, 0)[:rows])
        static = Case(self.problem.spec, batch=ROWS, context=context, seed=seed).problem().static
        self.problem = self.problem.replace(static=static)

    @precondition(lambda self: self.problem.static is not None)
    @rule()
    def detach(self) -> None:
        """Take the context away."""
        self.steps.append("detach")
        self.problem = self.problem.replace(static=None)

    @precondition(lambda self: self.x.shape[1] < LONGEST)
    @rule(tokens=st.sampled_from([1, 1, 4, 3]), padded=st.booleans(), seed=seeds())
    def extend(self, tokens: int, padded: bool, seed: int) -> None:
        """Prefill a chunk or decode one token on every backend; each gives the oracle's rows."""
        tokens = min(tokens, LONGEST - self.x.shape[1])
        self.steps.append(f"{tokens} tokens{', the first row padded' if padded else ''}")
        new = np.random.default_rng(seed).normal(size=(ROWS, tokens, self.x.shape[2])).astype(np.float32)
        real = np.ones((ROWS, tokens), dtype=bool)
        real[0] = not padded
        self.x, self.mask = np.concatenate([self.x, new], axis=1), np.concatenate([self.mask, real], axis=1)
        whole = self._whole()

        def check(subject: Subject) -> None:
            call = whole.part(slice(whole.x.shape[1] - tokens, None), (tokens,))
            outcome = subject.run(call, cache=self.caches.get(subject.name))
            self.caches[subject.name] = outcome.cache
            subject.expect_last(whole, outcome.output)

        self.judge.each("; ".join(self.steps), check)

    @precondition(lambda self: self.x.shape[1] > 0)
    @rule(rows=st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
    def reorder(self, rows: list[int]) -> None:
        """Select rows of the cache, as a beam search does."""
        self.steps.append(f"reorder {rows}")
        self.x, self.mask = self.x[rows], self.mask[rows]
        self._each_cache(lambda layer, cache: layer.reorder(cache, np.array(rows)))

    @precondition(lambda self: self.x.shape[1] > 1)
    @rule(back=st.integers(1, 5))
    def crop(self, back: int) -> None:
        """Take the last tokens back."""
        length = max(1, self.x.shape[1] - back)
        self.steps.append(f"crop to {length}")
        self.x, self.mask = self.x[:, :length], self.mask[:, :length]
        self._each_cache(lambda layer, cache: layer.crop(cache, length))

    @invariant()
    def tokens_and_caches_are_in_step(self) -> None:
        """Every backend that was asked has a cache, and none has one without live tokens."""
        if hasattr(self, "caches"):
            assert bool(self.caches) == (self.x.shape[1] > 0)

    def _whole(self) -> Problem:
        positions = np.maximum(np.cumsum(self.mask, axis=1) - 1, 0)
        return self.problem.replace(x=self.x, mask=self.mask, positions=positions, calls=(self.x.shape[1],))

    def _each_cache(self, change: Any) -> None:
        for subject in self.judge.subjects:
            layer = subject.layer(self.problem)
            cache = self.caches[subject.name]
            self.caches[subject.name] = subject.attempt(lambda layer=layer, cache=cache: change(layer, cache))


@prop("LIVE-4", "BATCH-5", "STATIC-3", "POSITION-1", needs=("static", "cache", "reorder", "crop"))
def test_life_of_a_cache(judge: Judge) -> None:
    """Prefill, decode, attach, detach, replace, reorder, crop, reset in any order: the oracle's values after each."""

    class Machine(CacheMachine):
        pass

    Machine.judge = judge
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        seed(current().seed)(Machine),
        settings=settings(
            max_examples=current().examples(0.5), stateful_step_count=12, deadline=None, database=None, print_blob=False
        ),
    )
