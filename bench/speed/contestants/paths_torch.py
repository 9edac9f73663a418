"""Which of the PyTorch backend's fast paths the suite's generated cases reach, and that they are right on each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from lyra.backends.torch_impl import TorchBackend, attention_backend, layer, partial, static
from lyra.backends.torch_impl.heads import LyraHeads
from lyra.backends.torch_impl.partial import Partial
from lyra.backends.torch_impl.static import PlacedStatic, StaticKV
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
    "queries are taken in tiles",
    "a context is attached in pieces",
    "keys that no query of a tile sees are left out",
)
TILE = 64
"""Scores of a tile of queries, and elements of a piece, instead of millions: small cases have several."""


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
    """Note the paths that are taken while the block runs, in which tiles of queries are small."""

    def static_attention(queries: Any, context: StaticKV, lyra: LyraHeads, *rest: Any) -> Partial:
        facts = (
            len(context.keys) == 1 < len(queries),
            context.visible is None,
            False,
            context.visible is not None,
            not lyra.everywhere,
            lyra.everywhere,
            bool((lyra.queries.any(dim=1) & ~lyra.queries.all(dim=1)).any()),
        )
        seen.update(path for path, fact in zip(PATHS, facts, strict=False) if fact)
        return kept["static_attention"](queries, context, lyra, *rest)

    def rotate_static(placed: PlacedStatic, *rest: Any) -> StaticKV:
        made: StaticKV = kept["rotate_static"](placed, *rest)
        pieces.append(made.keys.shape[2])
        if pieces[-1] < placed.mask.shape[1]:
            seen.add(PATHS[2])
        if len(pieces) > 1:
            seen.add(PATHS[8])
        return made

    def prepare_static(*given: Any) -> StaticKV:
        pieces.clear()
        return kept["prepare_static"](*given)

    def attention_tile(query: Any, keys: Any, *rest: Any) -> Partial:
        tiles.append(query.shape[-2])
        if len(tiles) > 1:
            seen.add(PATHS[7])
        if keys.shape[-2] < slots[-1]:
            seen.add(PATHS[9])
        return kept["_tile"](query, keys, *rest)

    def whole(query: Any, keys: Any, *rest: Any) -> Partial:
        tiles.clear()
        slots.append(keys.shape[-2])
        return kept["partial_attention"](query, keys, *rest)

    tiles: list[int] = []
    slots: list[int] = []
    pieces: list[int] = []
    places: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
        (layer, "static_attention", static_attention),
        (static, "rotate_static", rotate_static),
        (attention_backend, "prepare_static", prepare_static),
        (partial, "_tile", attention_tile),
        (layer, "partial_attention", whole),
        (static, "partial_attention", whole),
    )
    kept = {name: getattr(module, name) for module, name, _ in places}
    sizes = partial.SCORES_PER_TILE, static.TILE
    try:
        partial.SCORES_PER_TILE = static.TILE = TILE
        for module, name, watching in places:
            setattr(module, name, watching)
        yield
    finally:
        partial.SCORES_PER_TILE, static.TILE = sizes
        for module, name, _ in places:
            setattr(module, name, kept[name])
