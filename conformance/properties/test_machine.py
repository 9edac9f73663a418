"""Clauses LIVE, STATIC and BATCH over a whole life of a cache: Hypothesis decides what happens to it, step by step.

The context is that of each call (STATIC-5), so attaching, replacing and detaching are nothing but other calls on the
same cache; the oracle is given all live tokens so far and the context of the last call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, seed
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
from lyra.conformance.case_sizes import SMALLEST
from lyra.conformance.generation import settings_of
from lyra.conformance.judge import Judge
from lyra.conformance.premises import Premise
from lyra.conformance.registry import prop
from lyra.conformance.scope import Scope
from lyra.conformance.session import Session
from lyra.conformance.strategies import attention_specs, seeds
from lyra.conformance.subject import Outcome, Subject, expected
from lyra.spec.attention import AttentionSpec

ROWS, LONGEST, SLOTS = 2, 14, 7
SIZES = SMALLEST.replace(heads=(4, 2), batch=ROWS)


@dataclass(frozen=True)
class Life:
    """What one cache has lived through: inputs [B,T,E], mask [B,T], and every backend's cache of them."""

    x: np.ndarray
    mask: np.ndarray
    caches: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        """Live tokens so far, padding included."""
        return int(self.x.shape[1])

    def longer(self, x: np.ndarray, mask: np.ndarray, caches: Mapping[str, Any]) -> Life:
        """With some more tokens, and the caches that hold them too."""
        return Life(np.concatenate([self.x, x], axis=1), np.concatenate([self.mask, mask], axis=1), caches)


def shorter(tokens: int, back: int) -> int:
    """How many of the tokens are left once `back` are taken back."""
    return max(0, tokens - back)


def places(rows: list[int]) -> list[int]:
    """The rows that a beam search goes on with."""
    return rows


class CacheMachine(RuleBasedStateMachine):
    """One layer, the context attached now, the life that goes on, and another one that `switch` goes back to."""

    judge: Judge
    scope: Scope

    @initialize(spec=st.runner().flatmap(lambda machine: attention_specs(SIZES, scope=machine.scope)), seed=seeds())
    def begin(self, spec: Any, seed: int) -> None:
        """A layer with its weights and no live tokens."""
        self.steps = [f"layer {spec.lyra_q_heads}, {spec.static}, seed {seed}"]
        self.problem = Case(spec, calls=(LONGEST,), batch=ROWS, seed=seed).problem()
        self.layers: dict[str, Any] = {}
        self.reset()
        self.other = self.life

    def story(self, seed: int) -> None:
        """Something of everything, so that no run depends on chance for it."""
        self.extend(tokens=4, padded=False, seed=seed)
        self.attach(kind="rows", hidden=1, slots=SLOTS, seed=seed)
        self.fork()
        self.extend(tokens=3, padded=True, seed=seed + 1)
        self.reorder(rows=[1, 0])
        self.crop(back=2)
        self.next_token_is_right()

    @rule()
    def reset(self) -> None:
        """Forget all live tokens; the context stays."""
        self.steps.append("reset")
        self.life = Life(self.problem.x[:, :0], self.problem.mask[:, :0], {})

    @rule(
        kind=st.sampled_from(["shared", "rows"]),
        hidden=st.integers(0, SLOTS),
        slots=st.sampled_from([SLOTS, 1, 0]),
        seed=seeds(),
    )
    def attach(self, kind: str, hidden: int, slots: int, seed: int) -> None:
        """Attach a context, or put another in the place of the one that is there; rows may see different lengths."""
        self.steps.append(f"attach {kind} context of {slots} slots, {hidden} hidden in its first row, seed {seed}")
        rows = 1 if kind == "shared" else ROWS
        context = Context(slots, batch=rows, start=seed % 50, hidden=(hidden, 0)[:rows], gaps=seed % 2 == 1)
        static = Case(self.problem.spec, batch=ROWS, context=context, seed=seed).problem().static
        seen = static is not None and bool(static.mask.any()) and bool(self.problem.spec.lyra_q_heads)
        self.judge.meet(ATTACHED, seen and self.life.tokens > 0)
        self.problem = self.problem.replace(static=static)

    @precondition(lambda self: self.problem.static is not None)
    @rule()
    def detach(self) -> None:
        """Take the context away."""
        self.steps.append("detach")
        self.problem = self.problem.replace(static=None)

    @precondition(lambda self: self.life.tokens < LONGEST)
    @rule(tokens=st.sampled_from([1, 1, 4, 3]), padded=st.booleans(), seed=seeds())
    def extend(self, tokens: int, padded: bool, seed: int) -> None:
        """Prefill a chunk or decode one token."""
        tokens = min(tokens, LONGEST - self.life.tokens)
        self.steps.append(f"{tokens} tokens{', the first row padded' if padded else ''}, seed {seed}")
        new = np.random.default_rng(seed).normal(size=(ROWS, tokens, self.life.x.shape[2])).astype(np.float32)
        real = np.ones((ROWS, tokens), dtype=bool)
        real[0] = not padded
        self.life = self._go_on(new, real)

    @rule()
    def fork(self) -> None:
        """Keep the cache as it is now, to be gone on from a second time."""
        self.steps.append("fork")
        self.other = self.life

    @rule()
    def switch(self) -> None:
        """Go on from the other cache: one that was kept, or the continuation that was left for it."""
        self.steps.append("switch")
        self.life, self.other = self.other, self.life

    @precondition(lambda self: self.life.tokens > 0)
    @rule(rows=st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
    def reorder(self, rows: list[int]) -> None:
        """Select rows of the cache, as a beam search does."""
        rows = places(rows)
        self.judge.meet(REORDERED, rows != list(range(ROWS)))
        self.steps.append(f"reorder {rows}")
        caches = self._each_cache(lambda layer, cache: layer.reorder(cache, np.array(rows)))
        self.life = Life(self.life.x[rows], self.life.mask[rows], caches)

    @precondition(lambda self: self.life.tokens > 0)
    @rule(back=st.integers(1, 5))
    def crop(self, back: int) -> None:
        """Take the last tokens back, all of them at most."""
        length = shorter(self.life.tokens, back)
        self.judge.meet(CROPPED, 0 < length < self.life.tokens)
        self.steps.append(f"crop to {length}")
        caches = self._each_cache(lambda layer, cache: layer.crop(cache, length))
        self.life = Life(self.life.x[:, :length], self.life.mask[:, :length], caches)

    @invariant()
    def next_token_is_right(self) -> None:
        """After every step: one more token, which nobody keeps, so that what follows is a second continuation."""
        token = np.random.default_rng(len(self.steps)).normal(size=(ROWS, 1, self.life.x.shape[2]))
        self._go_on(token.astype(np.float32), np.ones((ROWS, 1), dtype=bool))

    def _go_on(self, x: np.ndarray, mask: np.ndarray) -> Life:
        """The life with more tokens [B,T,E], every backend holding the oracle's values and each other's."""
        whole = self._whole(self.life.longer(x, mask, {}))
        tokens = slice(-x.shape[1], None)
        last = whole.part(tokens, (x.shape[1],))
        outcomes: dict[str, Outcome] = {}

        def check(subject: Subject) -> None:
            cache, layer = self.life.caches.get(subject.name), self._layer(subject)
            outcomes[subject.name] = outcome = subject.run(last, cache=cache, layer=layer)
            subject.expect_last(whole, outcome.output)

        story = "; ".join(self.steps)
        self.judge.each(story, check)
        outputs = {name: outcome.output for name, outcome in outcomes.items()}
        self.judge.agree_on(
            story, last, "output", outputs, expected(whole)["output"].pick((slice(None), tokens)), last.real
        )
        return self.life.longer(x, mask, {name: outcome.cache for name, outcome in outcomes.items()})

    def _whole(self, life: Life) -> Problem:
        positions = np.maximum(np.cumsum(life.mask, axis=1) - 1, 0)
        return self.problem.replace(x=life.x, mask=life.mask, positions=positions, calls=(life.tokens,))

    def _layer(self, subject: Subject) -> Any:
        """A backend's one layer for all calls: whatever it keeps from a call must not show in another."""
        if subject.name not in self.layers:
            self.layers[subject.name] = subject.layer(self.problem)
        return self.layers[subject.name]

    def _each_cache(self, change: Any) -> dict[str, Any]:
        found = {}
        for subject in [some for some in self.judge.subjects if some.name in self.life.caches]:
            layer, cache = self._layer(subject), self.life.caches[subject.name]
            found[subject.name] = subject.attempt(lambda layer=layer, cache=cache: change(layer, cache))
        return found


ATTACHED = Premise(
    "a context attached to a cache that holds tokens",
    tame=lambda case: case if case.context is None else case.replace(context=case.context.replace(tokens=0)),
)
CROPPED = Premise("a cache that tokens are taken from", names={"shorter": lambda tokens, back: tokens})
REORDERED = Premise("a cache whose rows change places", names={"places": lambda rows: list(range(ROWS))})


@prop(
    "LIVE-4",
    "BATCH-5",
    "STATIC-5",
    "STATIC-3",
    "POSITION-1",
    premise=(ATTACHED, CROPPED, REORDERED),
    needs=("static", "cache", "reorder", "crop"),
)
def test_life_of_a_cache(judge: Judge, suite: Session) -> None:
    """Prefill, decode, attach, detach, replace, fork, switch, reorder, crop, reset: the oracle's values after each."""

    class Machine(CacheMachine):
        pass

    Machine.judge, Machine.scope = judge, suite.scope

    @settings_of(suite, max_examples=1, database=None)
    @given(spec=attention_specs(SIZES, scope=suite.scope), seed=seeds())
    def tell(spec: AttentionSpec, seed: int) -> None:
        machine = Machine()
        machine.begin(spec=spec, seed=seed)
        machine.story(seed)

    tell()
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        seed(suite.seed)(Machine),
        settings=settings_of(suite, 0.25, stateful_step_count=12),
    )
