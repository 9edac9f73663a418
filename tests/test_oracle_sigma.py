"""The oracle's σ against float32 computations done naively: of the size of their rounding, and of no more."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from lyra.conformance.case import FLAVOURS, Case, Context, Problem
from lyra.conformance.tolerance import K, distance
from lyra.spec.attention import AttentionSpec, RopeSpec
from lyra.spec.reference import context_end, reference, stage_from_trace
from lyra.spec.split import HeadSplit
from lyra.spec.uncertain import exact, linear

FLOAT = np.float32


def stages_of(problem: Problem) -> dict:
    return reference(
        problem.spec,
        problem.weights,
        problem.x,
        positions=problem.positions,
        mask=problem.mask,
        static=problem.static,
    )


LANES = 4


class Naive:
    """One layer in float32, every sum in a random order: correct, and no better."""

    def __init__(self, problem: Problem, rng: np.random.Generator) -> None:
        self.problem, self.spec, self.rng = problem, problem.spec, rng

    def sum(self, products: np.ndarray) -> np.ndarray:
        """The sum over the last axis in float32, in a random order, over a few accumulators as kernels have them."""
        lanes = min(LANES, products.shape[-1])
        totals = np.zeros((*products.shape[:-1], lanes), FLOAT)
        for place, index in enumerate(self.rng.permutation(products.shape[-1])):
            totals[..., place % lanes] += products[..., index]
        total = totals[..., 0]
        for lane in range(1, lanes):
            total = total + totals[..., lane]
        return total

    def linear(self, x: np.ndarray, kind: str) -> np.ndarray:
        """x [..., n] by W [m, n]."""
        out = self.sum(x[..., None, :] * self.problem.weights[f"{kind}_proj.weight"])
        return out + self.problem.weights[f"{kind}_proj.bias"] if self.spec.bias else out

    def norm(self, y: np.ndarray, kind: str) -> np.ndarray:
        """RMSNorm in float32."""
        assert self.spec.qk_norm is not None
        mean = self.sum(y * y)[..., None] / FLOAT(y.shape[-1])
        root = FLOAT(1) / np.sqrt(mean + FLOAT(self.spec.qk_norm.eps))
        return y * root * (FLOAT(1) + self.problem.weights[f"{kind}_norm.weight"])

    def turn(self, y: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """y [..., D] at positions [...], angles in float32."""
        if self.spec.rope is None:
            return y
        half = y.shape[-1] // 2
        powers = np.arange(half) * 2 / y.shape[-1]
        inverse = (self.spec.rope.theta**-powers / self.spec.rope.factor).astype(FLOAT)
        angle = positions[..., None].astype(FLOAT) * inverse
        cos, sin = np.cos(angle), np.sin(angle)
        one, two = y[..., :half], y[..., half:]
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    def stages(self) -> dict[str, np.ndarray]:
        """Every stage, by trace name."""
        problem, spec = self.problem, self.spec
        shape = (*problem.x.shape[:2], -1, spec.head_dim)
        found = {f"{kind}_proj": self.linear(problem.x, kind).reshape(shape) for kind in "qkv"}
        q, k = found["q_proj"], found["k_proj"]
        if spec.qk_norm is not None:
            q, k = found["q_norm"], found["k_norm"] = self.norm(q, "q"), self.norm(k, "k")
        heads = [self.head(q, k, found["v_proj"], h) for h in range(spec.num_attention_heads)]
        if spec.rope is not None:
            found["q_rope"], found["k_rope"] = (self.turn(y, problem.positions[:, :, None]) for y in (q, k))
        found["heads"] = np.stack(heads, axis=2)
        found["output"] = self.linear(found["heads"].reshape(*problem.x.shape[:2], -1), "o")
        return found

    def head(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, h: int) -> np.ndarray:
        """One head [B,T,D] with its keys [B,L,D], static ones first, all causal and real."""
        spec, problem = self.spec, self.problem
        kv_head, positions = h // spec.group_size, problem.positions
        key, value = k[:, :, kv_head], v[:, :, kv_head]
        visible = positions[:, :, None] >= positions[:, None, :]
        if h in spec.lyra_q_heads and problem.static is not None:
            static, axis = problem.static, spec.lyra_kv_heads.index(kv_head)
            positions = positions + context_end(spec, static)[:, None]
            key = np.concatenate([self.turn(static.k[:, axis], static.positions), self.turn(key, positions)], axis=1)
            value = np.concatenate([static.v[:, axis], value], axis=1)
            shown = np.broadcast_to(static.mask[:, None], (*visible.shape[:2], static.mask.shape[1]))
            visible = np.concatenate([shown, visible], axis=2)
        else:
            key = self.turn(key, positions)
        query = self.turn(q[:, :, h], positions)
        scores = self.sum(query[:, :, None] * key[:, None]) * FLOAT(spec.scale)
        if spec.softcap is not None:
            scores = FLOAT(spec.softcap) * np.tanh(scores / FLOAT(spec.softcap))
        scores = np.where(visible, scores, FLOAT(-np.inf))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = weights / self.sum(weights)[..., None]
        return self.sum(weights[:, :, None] * np.swapaxes(value, 1, 2)[:, None])


LARGER = AttentionSpec(64, 4, 2, 32, 32**-0.5)
STRUCTURES = {
    "plain": {},
    "no norm": {"qk_norm": None, "scale": 1 / 32},
    "no rope": {"rope": None},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "low theta": {"rope": RopeSpec(theta=1e4, factor=8.0)},
}
SIMULATIONS = 240


def simulated(index: int) -> Problem:
    """The index walks through structures, flavours, splits and positions."""
    spec = LARGER.replace(**list(STRUCTURES.values())[index % len(STRUCTURES)])
    split = ((), (2, 3), (0, 3), (0, 1, 2, 3))[index // 3 % 4]
    spec = spec.replace(split=HeadSplit.from_q_heads(spec, split, share_kv=None))
    flavour = list(FLAVOURS)[index // 7 % len(FLAVOURS)]
    far = (0, 100, 100_000)[index // 2 % 3]
    return Case(
        spec, calls=(6,), batch=1, context=Context(9, start=far, hidden=(2,)), start=far, flavour=flavour, seed=index
    ).problem()


def test_sigma_is_of_the_size_of_float32_rounding() -> None:
    """Of a few hundred correct float32 layers, no value at any stage is K·σ off, and the farthest is beyond σ/2."""
    chained, alone = defaultdict(list), defaultdict(list)
    for index in range(SIMULATIONS):
        problem = simulated(index)
        trace = Naive(problem, np.random.default_rng(index)).stages()
        whole = stages_of(problem)
        assert set(trace) == set(whole)
        for name, value in trace.items():
            assert value.dtype == FLOAT
            chained[name].append(distance(value, whole[name]).ratio)
            one = stage_from_trace(
                problem.spec,
                problem.weights,
                name,
                trace,
                problem.x,
                positions=problem.positions,
                static=problem.static,
            )
            alone[name].append(distance(value, one).ratio)
    for ratios in (chained, alone):
        assert set(ratios) == set(LARGER.trace_names())
        largest = {name: max(values) for name, values in ratios.items()}
        assert all(0.5 < value < K for value in largest.values()), largest
        typical = {name: float(np.median(values)) for name, values in ratios.items()}
        assert all(0.3 < value < 4 for value in typical.values()), typical


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        ("q_proj", lambda y: y * FLOAT(1 + 2**-16)),
        ("q_norm", lambda y: y.astype(np.float16).astype(FLOAT)),
        ("k_rope", lambda y: y + FLOAT(2e-5)),
        ("heads", lambda y: np.roll(y, 1, axis=2)),
        ("output", lambda y: y * FLOAT(1 - 2**-16)),
    ],
)
def test_what_is_not_rounding_is_far_beyond_k(stage: str, wrong: object) -> None:
    problem = simulated(6)
    trace = Naive(problem, np.random.default_rng(0)).stages()
    assert distance(trace[stage], stages_of(problem)[stage]).ratio < K
    assert distance(wrong(trace[stage]), stages_of(problem)[stage]).ratio > 2 * K  # type: ignore[operator]


def test_one_accumulator_stays_near_sigma_where_its_sum_is_large() -> None:
    """A kernel that adds one product after the other errs by more the larger its sum is, however small the products."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((8000, 64), FLOAT), rng.standard_normal((40, 64), FLOAT)
    total = np.zeros((8000, 40), FLOAT)
    for index in range(64):
        total += x[:, index, None] * weight[None, :, index]
    assert distance(total, linear(exact(x), weight, None)).ratio < 0.6 * K
