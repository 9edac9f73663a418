"""The shapes of the suite: every size that it promises occurs, whatever the seed, at a cost that is bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings

from lyra.conformance.case import Case
from lyra.conformance.case_sizes import COST, GROUPS, LARGE, SMALLEST, CaseSizes, make_sizes
from lyra.conformance.properties.test_split import group_cases
from lyra.conformance.session import PROFILES, Session
from lyra.conformance.strategies import cases
from lyra.spec.model import ModelSpec

THOROUGH, CI = PROFILES["thorough"].sizes, PROFILES["ci"].sizes
SEEDS = (0, 1, 7, 2**31)

COVERED: dict[str, Callable[[CaseSizes], bool]] = {
    "one row": lambda f: f.batch == 1,
    "8 rows": lambda f: f.batch == 8,
    "8 rows with a context each": lambda f: f.batch == f.context_batch == 8,
    "8 rows with one context": lambda f: f.batch == 8 and f.context_batch == 1,
    "64 tokens at once": lambda f: f.calls == (64,),
    "64 tokens in calls": lambda f: sum(f.calls) == 64 and len(f.calls) > 1,
    "4,096 slots": lambda f: f.context_tokens == 4096,
    "64 Q / 64 KV heads": lambda f: f.heads == (64, 64),
    "64 Q / 8 KV heads": lambda f: f.heads == (64, 8),
    "64 Q / 1 KV heads": lambda f: f.heads == (64, 1),
    "head_dim 8": lambda f: f.head_dim == 8,
    "head_dim 80": lambda f: f.head_dim == 80,
    "head_dim 96": lambda f: f.head_dim == 96,
    "head_dim 128": lambda f: f.head_dim == 128,
    "head_dim 256": lambda f: f.head_dim == 256,
    "hidden size 2,048": lambda f: f.hidden_size == 2048,
    "no norm": lambda f: not f.qk_norm,
    "no RoPE": lambda f: not f.rope,
    "a softcap": lambda f: f.softcap,
    "biases": lambda f: f.bias,
}
SMALL: dict[str, Callable[[CaseSizes], bool]] = {
    "one token": lambda f: sum(f.calls) == 1,
    "an empty context": lambda f: f.context_tokens == 0,
    "one slot": lambda f: f.context_tokens == 1,
    "one head": lambda f: f.heads == (1, 1),
    "as many KV heads as query heads": lambda f: f.heads[0] == f.heads[1] > 1,
    "one KV head": lambda f: f.heads[0] > f.heads[1] == 1,
}


def missing(sizes: Iterable[CaseSizes], wanted: dict[str, Callable[[CaseSizes], bool]]) -> list[str]:
    pool = tuple(sizes)
    return [name for name, occurs in wanted.items() if not any(map(occurs, pool))]


@pytest.mark.parametrize("seed", SEEDS)
def test_thorough_draws_every_size_the_suite_promises(seed: int) -> None:
    assert missing(make_sizes(THOROUGH, seed), COVERED | SMALL) == []


def test_ci_meets_every_large_size_in_cases_of_their_own() -> None:
    assert missing(LARGE.values(), COVERED) == []


def test_a_case_of_thorough_costs_at_most_twice_one_of_ci() -> None:
    def costs(count: int) -> list[int]:
        return [sizes.cost for seed in SEEDS for sizes in make_sizes(count, seed)]

    ci, thorough = costs(CI), costs(THOROUGH)
    assert max(ci + thorough) <= COST
    assert sum(thorough) / len(thorough) <= 2 * sum(ci) / len(ci)


GROUP: dict[str, Callable[[CaseSizes], bool]] = {
    f"{size} query heads to each of several KV heads": lambda f, size=size: (
        f.heads[1] > 1 and f.heads[0] == size * f.heads[1]
    )
    for size in range(1, 9)
}
ODD: dict[str, Callable[[CaseSizes], bool]] = {
    **{f"{count} KV heads": lambda f, count=count: f.heads[1] == count for count in (2, 3, 5, 6, 7)},
    **{f"{rows} rows": lambda f, rows=rows: f.batch == rows for rows in (4, 5, 6, 7)},
    "an odd number of pairs": lambda f: f.rope and f.head_dim > 2 and f.head_dim % 4 == 2,
    "one pair": lambda f: f.rope and f.head_dim == 2,
    "an odd head_dim": lambda f: f.head_dim > 1 and f.head_dim % 2 == 1,
    "head_dim 1": lambda f: f.head_dim == 1,
    "an odd width": lambda f: f.hidden_size > 1 and f.hidden_size % 2 == 1,
    "width 1": lambda f: f.hidden_size == 1,
}


@pytest.mark.parametrize("seed", SEEDS)
def test_every_profile_has_groups_of_every_size(seed: int) -> None:
    """A backend that mixes up the KV heads of groups of one size only is given that size in `smoke` already."""
    scope = Session(profile=PROFILES["smoke"], seed=seed).scope
    found = [case.spec for case in group_cases(scope).values()]
    assert [(one.num_attention_heads, one.num_key_value_heads) for one in found] == [f.heads for f in GROUPS.values()]
    assert missing(GROUPS.values(), GROUP | ODD) == []


def test_thorough_draws_groups_that_share_several_kv_heads() -> None:
    drawn = {sizes.heads[0] // sizes.heads[1] for sizes in make_sizes(THOROUGH, 0) if sizes.heads[1] > 1}
    assert drawn >= {1, 2, 3, 5, 6, 7}


@pytest.mark.parametrize("count", [CI, THOROUGH])
def test_three_quarters_of_a_pool_are_the_same_for_every_seed(count: int) -> None:
    pools = [set(make_sizes(count, seed)) for seed in SEEDS]
    assert len(set.intersection(*pools)) >= count * 3 // 4 - 1
    assert len({frozenset(pool) for pool in pools}) == len(SEEDS)


def test_a_spec_of_its_own_keeps_its_sizes_and_meets_no_large_ones() -> None:
    spec = ModelSpec.preset("gemma-3-1b").attention
    for sizes in make_sizes(THOROUGH, 0, spec):
        assert (sizes.heads, sizes.head_dim, sizes.hidden_size) == ((4, 1), 256, 1152)
        assert sizes.batch * sum(sizes.calls) <= 3 * 64
        assert sizes.context_tokens <= 40


@pytest.mark.parametrize("name", ["smallest", "frames"])
def test_cases_of_the_smallest_size_alone_can_be_drawn(name: str) -> None:
    @settings(max_examples=10, database=None, deadline=None)
    @given(cases(**{name: 1}))
    def drawn(case: Case) -> None:
        assert (case.calls, case.batch, case.spec.head_dim) == (SMALLEST.calls, SMALLEST.batch, SMALLEST.head_dim)

    drawn()
