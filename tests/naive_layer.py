"""A layer in float32, computed naively and in the literal form of every clause: what σ and the oracle are held to."""

from __future__ import annotations

import numpy as np

from lyra.conformance.case import Problem
from lyra.spec.reference import context_end

FLOAT = np.float32
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
