"""Backends that are wrong on purpose, each in one way: what the harness is held to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lyra.backends.protocol import (
    CAPABILITIES,
    Attention,
    Bfloat16Backend,
    CapturedLayer,
    Gradients,
    Result,
    SequentialBackend,
    get_backend,
)
from lyra.spec.attention import AttentionSpec, StaticSpec
from lyra.spec.inputs import StaticLayer
from lyra.spec.model import ModelSpec
from lyra.spec.sequential import SequentialSpec
from lyra.spec.split import HeadSplit

Make = Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
"""What a null backend answers for an input and a shape."""


def zeros(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Nothing at all."""
    return np.zeros(shape, dtype=np.float32)


def echo(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The input itself, repeated or cut until it has the shape."""
    return np.resize(x, shape).astype(np.float32)


def noise(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Noise of the right shape, the same for the same shape: a backend that never looks at what it is given."""
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def stage_shapes(spec: AttentionSpec | SequentialSpec, batch: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """The shape of every stage of a trace (ORDER-3, SEQUENTIAL-8)."""
    layer = spec.attention if isinstance(spec, SequentialSpec) else spec
    heads = dict.fromkeys("qh", layer.num_attention_heads) | dict.fromkeys("kv", layer.num_key_value_heads)
    return {
        name: (batch, tokens, heads[name[0]], layer.head_dim) if name[0] in heads else (batch, tokens, spec.hidden_size)
        for name in spec.trace_names()
    }


class NullAttention:
    """Answers every call with what `make` makes, in the right shapes."""

    def __init__(self, spec: AttentionSpec | SequentialSpec, make: Make) -> None:
        self.spec = spec
        self.make = make

    def __call__(
        self,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
        cache: object | None = None,
        trace: bool = False,
    ) -> Result:
        shapes = stage_shapes(self.spec, *x.shape[:2]) if trace else {}
        return Result(self.make(x, x.shape), (), {name: self.make(x, shape) for name, shape in shapes.items()})

    def vjp(
        self,
        cotangent: np.ndarray,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
    ) -> Gradients:
        """Gradients in the right shapes."""
        weights = {name: self.make(x, shape) for name, shape in self.spec.weight_shapes().items()}
        of_k, of_v = (None, None) if static is None else (self.make(x, part.shape) for part in (static.k, static.v))
        return Gradients(self.make(x, x.shape), weights, of_k, of_v)

    def reorder(self, cache: object, rows: Sequence[int]) -> object:
        """A cache with other rows."""
        return cache

    def crop(self, cache: object, length: int) -> object:
        """A cache with fewer tokens."""
        return cache


class NullText:
    """A text under gates whose NLL is what `make` makes."""

    def __init__(self, make: Make) -> None:
        self.make = make

    def nll(self, gates: np.ndarray) -> np.ndarray:
        """[C]."""
        return self.make(gates, gates.shape[:1])

    def gradient(self, gates: np.ndarray) -> tuple[float, np.ndarray]:
        """A number, and [L,Hq]."""
        return float(self.make(gates, ())), self.make(gates, gates.shape)


class NullEngine:
    """A whole model that answers with what `make` makes, in the right shapes."""

    module = None

    def __init__(self, spec: ModelSpec, make: Make) -> None:
        self.spec = spec
        self.make = make

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """[B,T,V]."""
        return self.make(ids, (*ids.shape, self.spec.vocab_size))

    def log_probs(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """[B,T-1]."""
        return self.make(ids, (ids.shape[0], ids.shape[1] - 1))

    def generate(self, ids: np.ndarray, mask: np.ndarray | None = None, *, max_new_tokens: int, **_: Any) -> np.ndarray:
        """[B,N]."""
        return np.zeros((ids.shape[0], max_new_tokens), dtype=np.int64)

    def capture(self, ids: np.ndarray, layers: Sequence[int], **_: Any) -> dict[int, CapturedLayer]:
        """k, v [1,Hkv,S,D] of every layer of the model, whichever are asked for."""
        attention = self.spec.attention
        shape = (1, attention.num_key_value_heads, ids.shape[1], attention.head_dim)
        return {layer: CapturedLayer(*(self.make(ids, shape) for _ in "kv")) for layer in range(len(self.spec.pattern))}

    def attach(self, static: Mapping[int, StaticLayer], splits: Mapping[int, HeadSplit], mode: StaticSpec) -> None:
        """Accepts any context."""

    def inject(self, static: Mapping[int, StaticLayer], blocks: Mapping[int, SequentialSpec]) -> None:
        """Accepts any blocks."""

    def set_gates(self, gates: Mapping[int, float]) -> None:
        """Accepts any gates."""

    def blended(self, ids: np.ndarray, scored: int, static: Mapping[int, StaticLayer]) -> NullText:
        """A text that nobody reads."""
        return NullText(self.make)

    def detach(self) -> None:
        """Has nothing attached."""

    def attention_weights(self, layer: int) -> dict[str, np.ndarray]:
        """Nothing of the right shapes."""
        shapes = self.spec.layer(layer).weight_shapes()
        return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}


class NullBackend:
    """Claims everything and computes nothing."""

    name = "null"
    capabilities = frozenset(CAPABILITIES)
    make: Make = staticmethod(zeros)

    def attention(
        self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], *, dtype: str = "float32"
    ) -> NullAttention:
        """A layer that ignores its weights and its dtype."""
        return NullAttention(spec, self.make)

    def sequential(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray]) -> NullAttention:
        """A block that ignores its weights."""
        return NullAttention(spec, self.make)

    def mesh(self, axes: Mapping[str, int]) -> Any:
        """A mesh, which it has no use for."""
        return dict(axes)

    def environment(self, devices: int) -> dict[str, str]:
        """None is needed: it has any number of devices."""
        return {}

    def load(
        self, folder: str, *, dtype: str = "float32", device: str | None = None, mesh: Any | None = None
    ) -> NullEngine:
        """A model that has read its config.json and nothing else."""
        return NullEngine(ModelSpec.from_hf_config(json.loads((Path(folder) / "config.json").read_text())), self.make)


class NullZeros(NullBackend):
    """Returns zeros."""

    name = "zeros"


class NullInput(NullBackend):
    """Returns its input."""

    name = "input"
    make = staticmethod(echo)


class NullNoise(NullBackend):
    """Returns noise."""

    name = "noise"
    make = staticmethod(noise)


class Raises(NullBackend):
    """Raises at every call."""

    name = "raises"

    @staticmethod
    def make(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """No answer."""
        raise RuntimeError("out of order")

    def attention(
        self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], *, dtype: str = "float32"
    ) -> NullAttention:
        """No layer either: it could not even refuse a dtype."""
        return self.make(np.zeros(0), ())  # type: ignore[return-value]


class WrongShape(NullBackend):
    """Returns one column too few."""

    name = "narrow"

    @staticmethod
    def make(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Zeros of a shape that nobody asked for."""
        return np.zeros((*shape[:-1], shape[-1] - 1), dtype=np.float32)


class WrappedAttention:
    """PyTorch's layer or block, its answers passed through the backend's `change`."""

    def __init__(self, backend: Wrapped, layer: Attention) -> None:
        self._layer = layer
        self._backend = backend

    def __call__(self, x: np.ndarray, **rest: Any) -> Result:
        return self._backend.change(self._layer(x, **rest))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class Wrapped:
    """The PyTorch backend's attention level, with a door to change what comes out of it."""

    name = "wrapped"
    capabilities: frozenset[str] = get_backend("torch").capabilities

    def attention(
        self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], *, dtype: str = "float32"
    ) -> WrappedAttention:
        """PyTorch's layer behind the door."""
        layer = cast(Bfloat16Backend, get_backend("torch")).attention(spec, weights, dtype=dtype)
        return WrappedAttention(self, layer)

    def sequential(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray]) -> WrappedAttention:
        """PyTorch's block behind the door."""
        return WrappedAttention(self, cast(SequentialBackend, get_backend("torch")).sequential(spec, weights))

    def change(self, result: Result) -> Result:
        """What comes out; nothing changes here."""
        return result


class NoCapabilities(Wrapped):
    """Right, but able to do nothing beyond one call without a context."""

    name = "modest"
    capabilities = frozenset()


class LyingTrace(Wrapped):
    """The right output with a trace that says otherwise: its rotated keys are the unrotated ones."""

    name = "liar"

    def change(self, result: Result) -> Result:
        """k_rope replaced by the stage before it."""
        if "k_rope" not in result.trace:
            return result
        before = result.trace["k_norm" if "k_norm" in result.trace else "k_proj"]
        return result._replace(trace={**result.trace, "k_rope": before})


class SlightlyOff(Wrapped):
    """Wrong by one per mille, from the third token of a call on."""

    name = "off"

    def change(self, result: Result) -> Result:
        """The later rows of the output, a little larger, in the trace too."""
        output = result.output.copy()
        output[:, 2:] *= 1.001
        return result._replace(output=output, trace={**result.trace, "output": output} if result.trace else {})


class Dies(Wrapped):
    """Takes its whole process with it where a layer has no RoPE."""

    name = "dies"

    def attention(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> WrappedAttention:
        """A layer, or the end."""
        if spec.rope is None:
            os._exit(3)
        return super().attention(spec, weights)
