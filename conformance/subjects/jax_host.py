"""A tiny decoder of JAX around the layer under test, and the hooks that feed that layer and watch it.

The whole model runs, compiled: its count of positions, its tables of cosines and sines, its caches, and another layer
beside the one under test. Only what enters the layer's attention (or its injected block) is exchanged for what the
suite gives. The numbers of a spec, which a model of one spec compiles in, are arguments here: every case has others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from lyra.backends.jax_impl import decoder, modules, tuning
from lyra.backends.jax_impl.decoder import Decoder, ModelCache
from lyra.backends.jax_impl.dtype import DTYPES, enter
from lyra.backends.jax_impl.forward import Structure
from lyra.backends.jax_impl.layer import Numbers, numbers_of
from lyra.backends.jax_impl.model import JaxEngine
from lyra.backends.jax_impl.shapes import make_room
from lyra.spec.attention import AttentionSpec, QKNormSpec, RopeSpec
from lyra.spec.model import LayerType, ModelSpec

PLACE, BESIDE = 1, 0
"""The layer under test, and the one beside it."""

WIDE = 4096
"""The window of a sliding-window layer beside the one under test: it never fills."""

VOCABULARY = 8

QUICKLY = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": "False"}
"""How models are compiled here, in a quarter of the time: what is judged is how they are put together. The numbers that
optimised code gives are judged in the backend `jax`, which runs the same stages."""

Stages = dict[str, Array]


class Built(NamedTuple):
    """A model with random weights: what it is compiled as, the names of its weights, and these."""

    structure: Structure
    names: tuple[str, ...]
    state: tuple[np.ndarray, ...]


class Given(NamedTuple):
    """The numbers of a layer's spec, as arrays: those of its attention, and the eps of its norms, if it has them."""

    numbers: Numbers
    eps: Any

    @classmethod
    def of(cls, spec: AttentionSpec) -> Given:
        """Those of a spec."""
        return cls(numbers_of(spec), None if spec.qk_norm is None else np.float32(spec.qk_norm.eps))


class Fed:
    """Stands in the place of a layer's attention: calls it with x, whatever the model gives, and keeps its stages."""

    def __init__(self, attention: Any, x: Array, stages: Stages) -> None:
        self.attention, self.x, self.stages = attention, x, stages

    def __call__(self, x: Array, call: Any, attached: Any, trace: Any = None) -> Any:
        """The attention's own answer."""
        return self.attention(self.x.astype(x.dtype), call, attached, self.stages)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)


def model_spec(spec: AttentionSpec, alike: bool) -> ModelSpec:
    """A model of two layers whose second is `spec`; the first is of the other kind, or `alike`, with another theta."""
    plain = spec.replace(split=None, sliding_window=None)
    other = plain.replace(rope=None if spec.rope is None else RopeSpec(theta=spec.rope.theta / 3 + 7))
    windowed = spec.sliding_window is not None
    sliding = plain.replace(sliding_window=spec.sliding_window) if windowed else other.replace(sliding_window=WIDE)
    first: LayerType = "global" if alike or windowed else "sliding"
    return ModelSpec(
        name="subject",
        vocab_size=VOCABULARY,
        intermediate_size=8,
        pattern=(first, "sliding" if windowed else "global"),
        attention=other if windowed else plain,
        sliding=sliding,
        rms_norm_eps=1e-6,
    )


def canonical(spec: AttentionSpec) -> AttentionSpec:
    """The spec with usual numbers: what is left is structure."""
    return spec.replace(
        split=None,
        scale=1.0,
        softcap=None if spec.softcap is None else 1.0,
        qk_norm=None if spec.qk_norm is None else QKNormSpec(),
        rope=None if spec.rope is None else RopeSpec(),
    )


@cache
def built(spec: ModelSpec) -> Built:
    """The model of a spec, which is made once for all that have its structure."""
    definition, state = nnx.split(nnx.eval_shape(lambda: Decoder(spec, rngs=nnx.Rngs(0))))
    flat = nnx.to_flat_state(state)
    leaves, tree = jax.tree.flatten(state)
    names = tuple(".".join(map(str, path)) for path, _ in flat)
    assert [leaf.shape for leaf in leaves] == [leaf.shape for _, leaf in flat]
    some = np.random.default_rng(24).normal(0, 0.3, 4099).astype(np.float32)  # a prime, so that no two rows are alike
    drawn = tuple(np.resize(some, leaf.shape) for leaf in leaves)
    return Built(Structure(definition, tree), names, drawn)


class Host:
    """A model of two layers, the second of which is under test, and its engine, which attaches and injects."""

    def __init__(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], dtype: str, *, alike: bool) -> None:
        """`weights` by their names within a decoder layer; others are random."""
        kind = DTYPES[dtype]
        self.spec = model_spec(spec, alike)
        self.built = built(model_spec(canonical(spec), alike))
        self.state: list[Any] = [
            enter(weights.get(name.removeprefix(f"layers.{PLACE}."), drawn), kind).copy()
            for name, drawn in zip(self.built.names, self.built.state, strict=True)
        ]
        module = self.built.structure.merge(self.state)
        module.spec = self.spec
        self.engine = JaxEngine(module, Path())
        self.dtype = kind

    @property
    def numbers(self) -> tuple[Given, ...]:
        """Those of each layer."""
        return tuple(Given.of(self.spec.layer(index)) for index in (BESIDE, PLACE))

    @property
    def attached(self) -> Any:
        """What the engine has attached or injected."""
        return self.engine._attached

    def run(self, x: np.ndarray, h: np.ndarray | None, mask: np.ndarray, held: ModelCache, first: bool) -> Any:
        """Output [B,N,E] of the attention, or of its block where h [B,N,E] is given, the cache after, the stages."""
        make_room(run)
        inner = None if h is None else enter(h, self.dtype)
        fed = enter(x, self.dtype), inner
        return run(self.built.structure, self.state, self.numbers, *fed, mask, held, self.attached, first=first)

    def pull_back(self, cotangent: np.ndarray, x: np.ndarray, mask: np.ndarray, held: ModelCache, tuned: Any) -> Any:
        """Gradients of sum(cotangent · output) to x, to all weights in their order, and to the context, if any."""
        make_room(pull_back)
        return pull_back(
            self.built.structure, self.state, self.numbers, cotangent, x, mask, held, self.attached, *tuned
        )


def forward(
    structure: Structure,
    state: Any,
    numbers: tuple[Given, ...],
    x: Array,
    h: Array | None,
    mask: Array,
    held: ModelCache,
    attached: Any,
    first: bool,
) -> tuple[Array, ModelCache, Stages]:
    """The model over tokens whose x enters the attention under test, h its block."""
    module: Any = structure.merge(state)
    stages: Stages = {}
    of_spec = {}
    for layer, given in zip(module.layers, numbers, strict=True):
        attention = layer.self_attn
        of_spec[attention.spec] = given.numbers
        if given.eps is not None:
            attention.q_norm.eps = attention.k_norm.eps = given.eps
    layer = module.layers[PLACE]
    vars(layer)["self_attn"] = Fed(layer.self_attn, x, {} if h is not None else stages)
    if h is not None:
        block = layer.run_block

        def fed(_: Array, *rest: Any) -> Any:
            return block(h, *rest, stages)

        vars(layer)["run_block"] = fed
    with numbers_given(of_spec):
        made = module(jnp.zeros(mask.shape, jnp.int32), mask, held, attached, first=first)
    return stages["output"], made.cache, stages


@contextmanager
def numbers_given(of_spec: Mapping[AttentionSpec, Numbers]) -> Iterator[None]:
    """While this lasts, a module finds the numbers of its spec among these."""

    def frequencies(spec: AttentionSpec) -> Array | None:
        return of_spec[spec].frequencies

    with (
        patch.object(modules, "numbers_of", of_spec.__getitem__),
        patch.object(decoder, "inverse_frequencies", frequencies),
    ):
        yield


@partial(jax.jit, static_argnames=("structure", "first"), compiler_options=QUICKLY)
def run(
    structure: Structure, state: Any, numbers: Any, x: Any, h: Any, mask: Any, held: Any, attached: Any, *, first: bool
) -> Any:
    """`forward`, compiled once for a structure; no cache is used up, for a caller may go on from one twice."""
    return forward(structure, state, numbers, x, h, mask, held, attached, first)


@partial(jax.jit, static_argnames="structure", compiler_options=QUICKLY)
def pull_back(
    structure: Structure,
    state: Any,
    numbers: Any,
    cotangent: Any,
    x: Any,
    mask: Any,
    held: Any,
    attached: Any,
    context: Any,
    settings: Any,
) -> Any:
    """Gradients to x, the weights and the context of a tuned layer, all of them zeros where there is none."""

    def output(x: Array, state: Any, context: Any) -> Array:
        tuned = {**attached, **tuning.attached(context, settings)}
        return forward(structure, state, numbers, x, None, mask, held, tuned, True)[0]

    _, back = jax.vjp(output, x, state, context)
    return back(cotangent)
