"""Which of the PyTorch backend's fast paths the suite's generated cases reach, and that they are right on each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from lyra.backends.torch_impl import TorchBackend, backend, layer, partial, static
from lyra.backends.torch_impl.heads import LyraHeads
from lyra.backends.torch_impl.partial import Partial
from lyra.backends.torch_impl.static import PreparedStatic
from lyra.conformance.case import Case
from lyra.conformance.launch import make_session
from lyra.conformance.record import Record
from lyra.conformance.scope import Scope
from lyra.conformance.strategies import cases
from lyra.conformance.subject import Subject

from ..row import Counted, Finding

PATHS = (
    "a context that several rows share is read once",
    "a context with every slot visible needs no mask",
    "hidden slots of a shared context are left out",
    "a context is masked by row",
    "only some KV heads read the context",
    "every KV head reads it, none is picked",
    "a split cuts a group",
    "queries are taken in blocks",
    "a context is attached in pieces",
    "keys that no query of a block sees are left out",
)
BLOCK = 64
"""Scores of a block of queries, and elements of a piece, instead of millions: small cases have several."""


def reached(examples: int, profile: str = "ci") -> Counted:
    """How many of so many drawn cases reach each path; every one of them is held to the oracle (clause TOLERANCE).

    Raises Divergence for a case that is wrong.
    """
    session = make_session(["torch"], profile=profile, seed=0, spec=None)
    subject, counts = Subject(TorchBackend(), Record()), Counter[str]()
    for case in drawn(examples, session.scope):
        problem, seen = case.problem(), set[str]()
        with watched(seen):
            subject.expect_oracle(problem, subject.run(problem))
        counts.update(seen)
    findings = [Finding(path, float(counts[path]), "cases", at_least=1.0) for path in PATHS]
    return Counted(findings)


def drawn(count: int, scope: Scope) -> list[Case]:
    """Cases with a context, as properties draw them."""
    found: list[Case] = []

    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @seed(1)
    @given(case=cases(scope, context=True))
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found


@contextmanager
def watched(seen: set[str]) -> Iterator[None]:
    """Note the paths that are taken while the block runs, in which blocks of queries are small."""

    def add_static(live: Partial, queries: Any, context: PreparedStatic, lyra: LyraHeads, *rest: Any) -> Partial:
        facts = (
            len(context.k) == 1 < len(queries),
            context.visible is None,
            False,
            context.visible is not None,
            not lyra.everywhere,
            lyra.everywhere,
            lyra.chosen is not None,
        )
        seen.update(path for path, fact in zip(PATHS, facts, strict=False) if fact)
        return kept["add_static"](live, queries, context, lyra, *rest)

    def placed(spec: Any, given: Any, *rest: Any) -> PreparedStatic:
        made: PreparedStatic = kept["_placed"](spec, given, *rest)
        pieces.append(made.k.shape[2])
        if pieces[-1] < given.mask.shape[1]:
            seen.add(PATHS[2])
        if len(pieces) > 1:
            seen.add(PATHS[8])
        return made

    def prepare_static(*given: Any) -> PreparedStatic | None:
        pieces.clear()
        return kept["prepare_static"](*given)

    def attention_block(q: Any, k: Any, *rest: Any) -> Partial:
        blocks.append(q.shape[-2])
        if len(blocks) > 1:
            seen.add(PATHS[7])
        if k.shape[-2] < keys[-1]:
            seen.add(PATHS[9])
        return kept["_block"](q, k, *rest)

    def whole(q: Any, k: Any, *rest: Any) -> Partial:
        blocks.clear()
        keys.append(k.shape[-2])
        return kept["partial_attention"](q, k, *rest)

    blocks: list[int] = []
    keys: list[int] = []
    pieces: list[int] = []
    places: dict[str, tuple[Any, Callable[..., Any]]] = {
        "add_static": (layer, add_static),
        "_placed": (static, placed),
        "prepare_static": (backend, prepare_static),
        "_block": (partial, attention_block),
        "partial_attention": (layer, whole),
    }
    kept = {name: getattr(module, name) for name, (module, _) in places.items()}
    sizes = partial.SCORES_PER_BLOCK, static.BLOCK
    try:
        partial.SCORES_PER_BLOCK = static.BLOCK = BLOCK
        for name, (module, made) in places.items():
            setattr(module, name, made)
        yield
    finally:
        partial.SCORES_PER_BLOCK, static.BLOCK = sizes
        for name, (module, _) in places.items():
            setattr(module, name, kept[name])
