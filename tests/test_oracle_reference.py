"""The oracle against SPEC.md written out in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lyra.conformance.case import FLAVOURS, Case, Context, Problem
from lyra.spec.attention import AttentionSpec, QKNormSpec, RopeSpec, StaticSpec
from lyra.spec.inputs import StaticLayer
from lyra.spec.reference import context_end, reference, stage_from_trace
from lyra.spec.split import HeadSplit

Vector = list[float]


class Loops:
    """One layer as SPEC.md says it, number by number. Nothing here is an array operation."""

    def __init__(self, problem: Problem) -> None:
        self.spec, self.problem = problem.spec, problem
        self.tokens = [(b, t) for b in range(problem.x.shape[0]) for t in range(problem.x.shape[1])]
        self.q = {at: self.project("q", at, self.spec.num_attention_heads) for at in self.tokens}
        self.k = {at: self.project("k", at, self.spec.num_key_value_heads) for at in self.tokens}
        self.v = {at: self.project("v", at, self.spec.num_key_value_heads) for at in self.tokens}
        self.q = {at: [self.norm(one, "q") for one in heads] for at, heads in self.q.items()}
        self.k = {at: [self.norm(head, "k") for head in heads] for at, heads in self.k.items()}

    def project(self, kind: str, at: tuple[int, int], heads: int) -> list[Vector]:
        """ORDER-1: head h is columns h·D to (h+1)·D."""
        weight, size = self.problem.weights[f"{kind}_proj.weight"], self.spec.head_dim
        return [self.linear(self.problem.x[at], weight, kind, range(h * size, (h + 1) * size)) for h in range(heads)]

    def linear(self, x: np.ndarray | Vector, weight: np.ndarray, kind: str, rows: range) -> Vector:
        """x · Wᵀ (+ bias) for some rows of W."""
        found = [math.fsum(float(a) * float(b) for a, b in zip(x, weight[row], strict=True)) for row in rows]
        if self.spec.bias:
            bias = self.problem.weights[f"{kind}_proj.bias"]
            found = [value + float(bias[row]) for value, row in zip(found, rows, strict=True)]
        return found

    def norm(self, y: Vector, kind: str) -> Vector:
        """NORM-1."""
        if self.spec.qk_norm is None:
            return y
        mean = math.fsum(value * value for value in y) / len(y)
        root = math.sqrt(mean + self.spec.qk_norm.eps)
        weight = self.problem.weights[f"{kind}_norm.weight"]
        return [value / root * (1 + float(w)) for value, w in zip(y, weight, strict=True)]

    def turn(self, y: Vector, position: int) -> Vector:
        """ROPE-1 and ROPE-2."""
        if self.spec.rope is None:
            return y
        size, turned = len(y), list(y)
        for i in range(size // 2):
            angle = position * self.spec.rope.theta ** (-2 * i / size) / self.spec.rope.factor
            one, two = y[i], y[i + size // 2]
            turned[i] = one * math.cos(angle) - two * math.sin(angle)
            turned[i + size // 2] = two * math.cos(angle) + one * math.sin(angle)
        return turned

    def visible(self, b: int, t: int, other: int, lyra: bool) -> bool:
        """LIVE, SLIDING-1 and MASKED-1."""
        problem = self.problem
        back = int(problem.positions[b, t]) - int(problem.positions[b, other])
        if not problem.mask[b, other] or back < 0:
            return False
        if self.spec.sliding_window is not None and back >= self.spec.sliding_window:
            return False
        if not lyra:
            return True
        return {"causal": True, "self": t == other, "none": False}[self.spec.static.live]

    def head(self, b: int, t: int, h: int) -> Vector:
        """STATIC-1: one softmax over what head h sees, static and live."""
        spec, problem = self.spec, self.problem
        lyra, kv_head, static = h in spec.lyra_q_heads, h // spec.group_size, problem.static
        row, shift = 0, 0
        if static is not None and lyra:
            row = b if len(static.k) > 1 else 0
            seen = [int(p) for p, shown in zip(static.positions[row], static.mask[row], strict=True) if shown]
            shift = max(seen) + 1 if seen and spec.static.positions == "continue" else 0
        query = self.turn(self.q[b, t][h], int(problem.positions[b, t]) + shift)
        keys, values = [], []
        if static is not None and lyra:
            axis = spec.lyra_kv_heads.index(kv_head)
            for slot in range(static.mask.shape[1]):
                if static.mask[row, slot]:
                    stored = [float(value) for value in static.k[row, axis, slot]]
                    keys.append(self.turn(stored, int(static.positions[row, slot])))
                    values.append([float(value) for value in static.v[row, axis, slot]])
        for other in range(problem.x.shape[1]):
            if self.visible(b, t, other, lyra):
                keys.append(self.turn(self.k[b, other][kv_head], int(problem.positions[b, other]) + shift))
                values.append(self.v[b, other][kv_head])
        if not keys:
            return [0.0] * spec.head_dim  # MASKED-2
        scores = [spec.scale * math.fsum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
        if spec.softcap is not None:
            scores = [spec.softcap * math.tanh(score / spec.softcap) for score in scores]
        weights = [math.exp(score - max(scores)) for score in scores]
        return [
            math.fsum(w * value[d] for w, value in zip(weights, values, strict=True)) / math.fsum(weights)
            for d in range(spec.head_dim)
        ]

    def stages(self) -> dict[str, np.ndarray]:
        """heads [B,T,Hq,D] and output [B,T,E]."""
        shape = (*self.problem.x.shape[:2], self.spec.num_attention_heads, self.spec.head_dim)
        heads, output = np.zeros(shape), np.zeros(self.problem.x.shape)
        weight = self.problem.weights["o_proj.weight"]
        for b, t in self.tokens:
            for h in range(self.spec.num_attention_heads):
                heads[b, t, h] = self.head(b, t, h)
            output[b, t] = self.linear(heads[b, t].ravel(), weight, "o", range(self.spec.hidden_size))
        return {"heads": heads, "output": output}


@st.composite
def tiny_cases(draw: st.DrawFn) -> Case:
    """Layers so small that loops over them are quick, with everything that a spec can switch."""
    query_heads, kv_heads = draw(st.sampled_from([(4, 2), (2, 2), (4, 1), (6, 3)]))
    spec = AttentionSpec(
        hidden_size=5,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=4,
        scale=draw(st.sampled_from([0.5, 168**-0.5, 1.3])),
        softcap=draw(st.sampled_from([None, 0.7, 30.0])),
        bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from([None, QKNormSpec(), QKNormSpec(eps=1e-2)])),
        rope=draw(st.sampled_from([None, RopeSpec(), RopeSpec(theta=300.0, factor=8.0)])),
        static=StaticSpec(
            live=draw(st.sampled_from(["causal", "self", "none"])),
            positions=draw(st.sampled_from(["continue", "overlay"])),
        ),
    )
    window = draw(st.sampled_from([None, None, 1, 2, 4]))
    batch = draw(st.integers(1, 2))
    context = None
    if window is None:
        heads = draw(st.sets(st.integers(0, query_heads - 1)))
        spec = spec.replace(split=HeadSplit.from_q_heads(spec, heads, share_kv=None))
        slots = draw(st.integers(0, 4))
        context = draw(
            st.none()
            | st.builds(
                Context,
                tokens=st.just(slots),
                batch=st.sampled_from([1, batch]),
                start=st.sampled_from([0, 3, 1000]),
                hidden=st.lists(st.integers(0, slots), min_size=batch, max_size=batch).map(tuple),
                gaps=st.booleans(),
            )
        )
    tokens = draw(st.integers(1, 5))
    return Case(
        spec=spec if window is None else spec.replace(sliding_window=window),
        calls=(tokens,),
        batch=batch,
        context=context,
        padding=tuple(draw(st.lists(st.integers(0, tokens - 1), min_size=batch, max_size=batch))),
        padding_side=draw(st.sampled_from(["left", "right"])),
        start=draw(st.sampled_from([0, 7, 5000])),
        flavour=draw(st.sampled_from(list(FLAVOURS))),
        poison=draw(st.sampled_from([1.0, 1e6])),
        seed=draw(st.integers(0, 10_000)),
    )


def oracle(problem: Problem) -> dict[str, np.ndarray]:
    return {name: one.value for name, one in stages_of(problem).items()}


def stages_of(problem: Problem) -> dict:
    return reference(
        problem.spec,
        problem.weights,
        problem.x,
        positions=problem.positions,
        mask=problem.mask,
        static=problem.static,
    )


def close(got: np.ndarray, wanted: np.ndarray, mask: np.ndarray, rtol: float) -> None:
    got, wanted = got[mask], wanted[mask]
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * max(1e-30, np.abs(wanted).max(initial=0)))


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(case=tiny_cases())
def test_the_oracle_is_the_spec_in_loops(case: Case) -> None:
    problem = case.problem()
    found, wanted = oracle(problem), Loops(problem).stages()
    for name, value in wanted.items():
        close(found[name], value, problem.mask, 1e-9)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(case=tiny_cases())
def test_a_stage_from_a_perfect_trace_is_the_oracles(case: Case) -> None:
    problem = case.problem()
    whole = oracle(problem)
    assert tuple(whole) == problem.spec.trace_names()
    for name, value in whole.items():
        alone = stage_from_trace(
            problem.spec,
            problem.weights,
            name,
            whole,
            problem.x,
            positions=problem.positions,
            mask=problem.mask,
            static=problem.static,
        )
        close(alone.value, value, problem.mask, 1e-8)
        assert (alone.variance >= 0).all()


def test_an_unknown_stage_is_refused() -> None:
    problem = Case(AttentionSpec(4, 2, 1, 4, 0.5)).problem()
    with pytest.raises(KeyError, match="unknown stage 'queries'"):
        stage_from_trace(problem.spec, problem.weights, "queries", {}, problem.x, positions=problem.positions)


def test_the_examples_of_the_spec() -> None:
    spec = AttentionSpec(4, 4, 2, 4, 0.5, rope=RopeSpec(theta=10_000.0), split=HeadSplit((2, 3)))
    zeros = np.zeros((3, 1, 5, 4), np.float32)
    mask = np.arange(5) < np.array([[5], [2], [0]])
    static = StaticLayer(zeros, zeros, mask, np.tile(np.arange(5), (3, 1)))
    assert context_end(spec, static).tolist() == [5, 2, 0]
    assert context_end(spec.replace(static=StaticSpec(positions="overlay")), static).tolist() == [0]
    assert context_end(spec, None).tolist() == [0]


def test_a_context_of_two_equal_scores_gives_the_mean_of_its_values() -> None:
    spec = AttentionSpec(4, 2, 1, 4, 0.5, split=HeadSplit((0, 1)), static=StaticSpec(live="none"))
    problem = Case(spec, calls=(1,), context=Context(2)).problem()
    assert problem.static is not None
    problem = problem.replace(static=problem.static._replace(k=np.zeros_like(problem.static.k)))
    wanted = problem.static.v[0, 0].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(oracle(problem)["heads"][0, 0], [wanted, wanted], rtol=1e-15)


def test_the_example_of_one_softmax() -> None:
    """STATIC-1: one static key of score ln 3 and one live key of score 0 give (3 v̄ + v) / 4."""
    spec = AttentionSpec(
        hidden_size=2, num_attention_heads=1, num_key_value_heads=1, head_dim=2, scale=1.0, rope=None, qk_norm=None
    )
    spec = spec.replace(split=HeadSplit.all(spec))
    unit, zero = np.eye(2, dtype=np.float32), np.zeros((2, 2), dtype=np.float32)
    weights = {"q_proj.weight": unit, "k_proj.weight": zero, "v_proj.weight": unit, "o_proj.weight": unit}
    k = np.array([math.log(3), 0.0], dtype=np.float32).reshape(1, 1, 1, 2)
    v = np.array([0.0, 4.0], dtype=np.float32).reshape(1, 1, 1, 2)
    static = StaticLayer(k, v, np.ones((1, 1), bool), np.zeros((1, 1), int))
    x = np.array([[[1.0, 0.0]]], dtype=np.float32)
    found = reference(spec, weights, x, positions=np.zeros((1, 1), int), static=static)["heads"].value
    np.testing.assert_allclose(found.ravel(), [0.25, 3.0], rtol=1e-7)
