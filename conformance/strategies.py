"""Public Hypothesis strategies: splits, specs, contexts and whole cases. Use them in your own tests:

from hypothesis import given
from lyra.conformance import strategies

@given(case=strategies.cases())
def test_mine(case): ...
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, get_args

import numpy as np
from hypothesis import strategies as st

from lyra.spec.attention import AttentionSpec, Live, Positions, QKNormSpec, RopeSpec, StaticSpec
from lyra.spec.inputs import Dtype
from lyra.spec.sequential import Source
from lyra.spec.split import HasHeads, HeadSplit

from .case import FLAVOURS, Block, Case, Context, Flavour
from .case_sizes import CaseSizes
from .scope import Scope, small_scope

FAR = 131_072
"""The highest position of a live or a static token (ROPE-3)."""

LIVE: tuple[Live, ...] = get_args(Live)
POSITIONS: tuple[Positions, ...] = get_args(Positions)


@cache
def _near_or_far(near: int, far: int) -> st.SearchStrategy[int]:
    """Integers from 0 to `near`, or from 0 to `far`. Kept: Hypothesis examines a strategy that it has not met before,
    which takes longer than drawing from it. For the same reason choices are tuples, by which it knows them again.
    """
    return st.one_of(st.integers(0, near), st.integers(0, far))


@cache
def _orders(count: int) -> st.SearchStrategy[list[int]]:
    """Permutations of 0 to `count` - 1."""
    return st.permutations(range(count))


@st.composite
def head_splits(draw: st.DrawFn, spec: HasHeads, kv_heads: int | None = None, aligned: bool | None = None) -> HeadSplit:
    """Any split of the heads of `spec` that reads exactly `kv_heads` KV heads (any number if None).

    With aligned=True whole groups only; None allows cut groups, where `share_kv` is set.
    """
    total, group = spec.num_key_value_heads, spec.num_attention_heads // spec.num_key_value_heads
    count = draw(st.integers(0, total)) if kv_heads is None else kv_heads
    order = draw(_orders(total))
    heads: list[int] = []
    for kv_head in order[:count]:
        members = range(kv_head * group, (kv_head + 1) * group)
        kept = 0 if aligned else draw(st.integers(0, 2**group - 1))  # a bit a head; none stands for all
        heads += [head for place, head in enumerate(members) if not kept or kept >> place & 1]
    return HeadSplit.from_q_heads(spec, heads, share_kv=None)


@st.composite
def attention_specs(
    draw: st.DrawFn,
    sizes: CaseSizes,
    *,
    scope: Scope | None = None,
    live: Sequence[Live] = LIVE,
    positions: Sequence[Positions] = POSITIONS,
    split: bool = True,
    window: bool = False,
) -> AttentionSpec:
    """A spec of these shapes and this structure, its numbers free; or the spec that a scope holds cases to. A window
    excludes a split.
    """
    scope = scope or small_scope()
    if scope.spec is not None:
        spec = scope.spec.replace(split=draw(st.sampled_from(scope.splits))) if scope.splits else scope.spec
    else:
        scale = sizes.head_dim**-0.5
        spec = AttentionSpec(
            hidden_size=sizes.hidden_size,
            num_attention_heads=sizes.heads[0],
            num_key_value_heads=sizes.heads[1],
            head_dim=sizes.head_dim,
            scale=draw(st.sampled_from((scale, scale / 2, 1.5 * scale, 168**-0.5))),
            softcap=draw(st.sampled_from((2.0, 0.5, 50.0))) if sizes.softcap else None,
            bias=sizes.bias,
            qk_norm=QKNormSpec(eps=draw(st.sampled_from((1e-6, 1e-5, 1e-3)))) if sizes.qk_norm else None,
            rope=RopeSpec(
                theta=draw(st.sampled_from((1e4, 1e6, 500.0, 123_456.0))), factor=draw(st.sampled_from((1.0, 8.0, 3.0)))
            )
            if sizes.rope
            else None,
        )
    changes: dict[str, Any] = {}
    if window and spec.sliding_window is None:
        changes = {"sliding_window": draw(st.integers(1, 12)), "split": None}
    elif split and spec.split is None and spec.sliding_window is None:
        changes["split"] = draw(head_splits(spec, kv_heads=sizes.static_kv_heads))
    if not scope.has_split:
        chosen = draw(st.sampled_from(tuple(live))), draw(st.sampled_from(tuple(positions)))
        changes["static"] = StaticSpec(live=chosen[0], positions=chosen[1])
    return spec.replace(**changes) if changes else spec


@st.composite
def contexts(draw: st.DrawFn, sizes: CaseSizes, *, far: bool = True, hidden: bool = True) -> Context:
    """A static context of these sizes: where it starts, what it hides, whether its positions have gaps."""
    tokens, rows = sizes.context_tokens, sizes.context_batch
    start = draw(_near_or_far(20, FAR - 3 * max(0, tokens - 1))) if far else 0
    return Context(
        tokens=tokens,
        batch=rows,
        start=start,
        hidden=tuple(draw(_near_or_far(0, tokens)) if hidden else 0 for _ in range(rows)),
        gaps=draw(st.booleans()),
    )


def seeds() -> st.SearchStrategy[int]:
    """Seeds of a case's data."""
    return st.integers(0, 2**32 - 1)


@st.composite
def cases(
    draw: st.DrawFn,
    scope: Scope | None = None,
    *,
    live: Sequence[Live] = LIVE,
    positions: Sequence[Positions] = POSITIONS,
    context: bool | None = None,
    split: bool = True,
    window: bool = False,
    padding: bool = True,
    hidden: bool = True,
    far: bool = True,
    flavours: Sequence[Flavour] = tuple(FLAVOURS),
    poison: Sequence[float] = (1e4, 1e9, 1e30),
    min_calls: int = 1,
    min_tokens: int = 1,
    min_context: int = 0,
    smallest: int | None = None,
    frames: int | None = None,
    prefer: Callable[[CaseSizes], bool] = bool,
    dtype: Dtype = "float32",
) -> Case:
    """Cases of a scope's sizes (small ones where none is given), or of so many of the `smallest` of them. `context`
    True, False, or None for either; the rest narrows what is drawn, `prefer` to some sizes if the scope has any such.
    `frames` is another name of `smallest`.
    """
    scope = scope or small_scope()

    def fits(some: CaseSizes) -> bool:
        enough_calls = len(some.calls) >= min_calls and sum(some.calls) >= min_tokens
        return enough_calls and (some.context_tokens >= min_context or context is False)

    pool = tuple(some for some in scope.sizes[: smallest or frames] if fits(some))
    pool = tuple(filter(prefer, pool)) or pool
    if not pool:
        raise ValueError(
            f"no size that cases are drawn from has {min_calls} calls, {min_tokens} tokens, {min_context} static tokens"
        )
    chosen = draw(st.sampled_from(pool))
    spec = draw(
        attention_specs(chosen, scope=scope, live=live, positions=positions, split=split and not window, window=window)
    )
    with_context = draw(st.booleans()) if context is None else context
    if spec.sliding_window is not None:
        with_context = False
    tokens = sum(chosen.calls)
    paddings: tuple[int, ...] = ()
    if padding and draw(st.booleans()):
        paddings = tuple(draw(st.integers(0, tokens - 1)) for _ in range(chosen.batch))
    return Case(
        spec=spec,
        calls=chosen.calls,
        batch=chosen.batch,
        context=draw(contexts(chosen, far=far, hidden=hidden)) if with_context else None,
        padding=paddings,
        padding_side=draw(st.sampled_from(("left", "right"))) if paddings else "left",
        start=draw(_near_or_far(0, FAR + 1 - tokens)) if far else 0,
        flavour=draw(st.sampled_from(tuple(flavours))),
        poison=draw(st.sampled_from(tuple(poison))),
        seed=draw(seeds()),
        dtype=dtype,
    )


def case_of(sizes: CaseSizes, rng: np.random.Generator) -> Case:
    """A case of these sizes, with a context: its numbers, heads and masks drawn, without Hypothesis."""
    query_heads, kv_heads = sizes.heads
    spec = AttentionSpec(
        hidden_size=sizes.hidden_size,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=sizes.head_dim,
        scale=sizes.head_dim**-0.5,
        softcap=2.0 if sizes.softcap else None,
        bias=sizes.bias,
        qk_norm=QKNormSpec() if sizes.qk_norm else None,
        rope=RopeSpec(theta=float(rng.choice([1e4, 1e6])), factor=float(rng.choice([1.0, 8.0])))
        if sizes.rope
        else None,
    )
    size = spec.group_size
    readers = rng.permutation(kv_heads)[: sizes.static_kv_heads]
    lyra = [int(kv * size + member) for kv in readers for member in rng.permutation(size)[: rng.integers(1, size + 1)]]
    tokens = sum(sizes.calls)
    return Case(
        spec.replace(
            split=HeadSplit.from_q_heads(spec, lyra, share_kv=None),
            static=StaticSpec(live=rng.choice(LIVE), positions=rng.choice(POSITIONS)),
        ),
        calls=sizes.calls,
        batch=sizes.batch,
        context=Context(
            sizes.context_tokens,
            batch=sizes.context_batch,
            start=int(rng.integers(0, FAR - 3 * sizes.context_tokens)),
            hidden=tuple(int(n) for n in rng.integers(0, max(1, sizes.context_tokens // 4), sizes.context_batch)),
            gaps=bool(rng.integers(2)),
        ),
        padding=tuple(int(n) for n in rng.integers(0, tokens, sizes.batch)) if rng.integers(2) else (),
        padding_side=rng.choice(["left", "right"]),
        start=int(rng.integers(0, FAR - tokens)),
        flavour=rng.choice(list(FLAVOURS)),
        seed=int(rng.integers(2**32)),
    )


@st.composite
def blocks(
    draw: st.DrawFn,
    *,
    source: Source = "external",
    residual: Sequence[bool] = (True, False),
    output_norm: bool = True,
) -> Block:
    """Injected blocks with an open gate, of either sign."""
    return Block(
        residual=draw(st.sampled_from(tuple(residual))),
        gate=draw(st.floats(0.1, 8.0)) * draw(st.sampled_from((1, -1))),
        norm_eps=draw(st.sampled_from((1e-6, 1e-5, 1e-3))),
        output_norm=output_norm,
        source=source,
    )


LONG = ((15, 1, 1, 1), (5, 28, 1))
"""Calls past 16 live tokens one by one, and past 16 and 32 at once: where caches that grow in steps take a step."""


def in_long_calls(some: st.SearchStrategy[Case]) -> st.SearchStrategy[Case]:
    """The same cases with dozens of live tokens; take them of the smallest size."""
    return st.builds(lambda case, calls: case.replace(calls=calls), some, st.sampled_from(LONG))


def block_cases(
    scope: Scope | None = None,
    *,
    source: Source = "external",
    residual: Sequence[bool] = (True, False),
    output_norm: bool = True,
    **rest: Any,
) -> st.SearchStrategy[Case]:
    """Cases of injected blocks: `rest` narrows `cases` of the scope, which give the attention in them and the data."""
    around = blocks(source=source, residual=residual, output_norm=output_norm)
    return st.builds(lambda case, block: case.replace(block=block), cases(scope, **rest), around)
