"""GroupedQueryAttention of both backends: held to the spec by the suite, and used as a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest

from lyra.backends.protocol import Result
from lyra.conformance.runner import run
from lyra.conformance.session import Profile, Session
from lyra.spec.attention import AttentionSpec, RopeSpec, grouped
from lyra.spec.errors import SpecError
from lyra.spec.inputs import check_call
from lyra.spec.reference import reference

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from lyra.backends.jax_impl.cache import with_room  # noqa: E402
from lyra.backends.jax_impl.grouped import GroupedQueryAttention as JaxModule  # noqa: E402
from lyra.backends.torch_impl.grouped import GroupedQueryAttention as TorchModule  # noqa: E402

Numbers = Mapping[str, np.ndarray]
Run = Callable[..., tuple[np.ndarray, Any]]
Build = Callable[..., Run]


def torch_run(module: Any, weights: Numbers) -> Run:
    """A PyTorch module with these weights, NumPy in and out."""
    module.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=True)

    def call(x: np.ndarray, cache: Any = None, **given: np.ndarray) -> tuple[np.ndarray, Any]:
        with torch.inference_mode():
            y, live = module(torch.tensor(x), cache=cache, **{key: torch.tensor(value) for key, value in given.items()})
        return y.numpy(), live

    return call


def jax_run(module: Any, weights: Numbers) -> Run:
    """A JAX module with these weights, NumPy in and out, compiled once for each shape."""
    state, left = nnx.state(module, nnx.Param), dict(weights)
    for path, leaf in nnx.to_flat_state(state):
        leaf.set_value(jnp.asarray(left.pop(".".join(map(str, path)))))
    assert not left
    nnx.update(module, state)

    step = nnx.jit(lambda module, x, past, given: module(x, cache=past, **given))

    def call(x: np.ndarray, cache: Any = None, **given: np.ndarray) -> tuple[np.ndarray, Any]:
        past = module.empty_cache(*x.shape[:2]) if cache is None else with_room(cache, x.shape[1])
        y, live = step(module, x, past, given)
        return np.asarray(y), live._replace(length=past.length + x.shape[1])

    return call


RNGS = nnx.Rngs(0)
RUNS: dict[str, tuple[Any, Any, Any]] = {
    "torch": (torch_run, TorchModule, TorchModule.from_spec),
    "jax": (jax_run, partial(JaxModule, rngs=RNGS), partial(JaxModule.from_spec, rngs=RNGS)),
}
"""A framework's module with weights, and how one is made, from sizes and from a spec."""


@pytest.fixture(params=RUNS)
def build(request: pytest.FixtureRequest) -> Build:
    """Makes a module of one backend with random weights, the same for both."""
    make_run, make_module, _ = RUNS[request.param]

    def build(*sizes: Any, **options: Any) -> Run:
        module = make_module(*sizes, **options)
        return make_run(module, weights_of(module.spec))

    return build


def weights_of(spec: AttentionSpec, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a layer."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * spec.hidden_size**-0.5).astype(np.float32)
        for name, shape in spec.weight_shapes().items()
    }


def tokens(batch: int, count: int, width: int, seed: int = 1) -> np.ndarray:
    """Random inputs [batch, count, width]."""
    return np.random.default_rng(seed).standard_normal((batch, count, width)).astype(np.float32)


def oracle(spec: AttentionSpec, weights: Numbers, x: np.ndarray) -> np.ndarray:
    """The oracle's output for tokens at 0, 1, …"""
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    return reference(spec, weights, x, positions=positions)["output"].value


class ModuleBackend:
    """A backend for the suite whose layers are the module: those without a context."""

    capabilities = frozenset({"cache"})

    def __init__(self, framework: str) -> None:
        self.name = f"{framework}-module"
        self.make_run, _, self.make = RUNS[framework]

    def attention(self, spec: AttentionSpec, weights: Numbers) -> ModuleAttention:
        """A layer of the module."""
        return ModuleAttention(spec, self.make_run(self.make(spec), weights))


class ModuleAttention:
    """One layer of the module behind the protocol."""

    def __init__(self, spec: AttentionSpec, call: Run) -> None:
        self.spec = spec
        self.call = call

    def __call__(
        self, x: Any, *, positions: Any, mask: Any = None, static: Any = None, cache: Any = None, trace: bool = False
    ) -> Result:
        """A call without a context."""
        inputs = check_call(self.spec, x, positions, mask, static)
        y, live = self.call(inputs.x, cache, positions=inputs.positions.astype(np.int32), mask=inputs.mask)
        return Result(y, live, {})


@pytest.mark.parametrize(
    ("framework", "only", "properties"),
    [("torch", "not hugging_face", 10), ("jax", "layer_equals_oracle", 1)],  # JAX compiles for every layer anew
)
def test_the_module_conforms(framework: str, only: str, properties: int) -> None:
    session = Session(backends=[ModuleBackend(framework)], profile=Profile("smoke", examples=4, sizes=3))
    outcome = run(session, only=only)
    assert outcome.exit_code == 0, outcome.log
    tallies = [one.tally(f"{framework}-module") for one in session.record.properties.values()]
    assert sum(tally.cases > 0 for tally in tallies) >= properties


@pytest.mark.parametrize(("kv_heads", "bias"), [(None, False), (4, False), (2, True), (1, False)])
def test_forward(build: Build, kv_heads: int | None, bias: bool) -> None:
    """The output is the oracle's, in MHA (the default), GQA and MQA."""
    spec = grouped(32, 4, kv_heads, rope=RopeSpec(theta=10_000.0), bias=bias)
    x = tokens(2, 6, 32)
    expected = oracle(spec, weights_of(spec), x)
    np.testing.assert_allclose(build(32, 4, kv_heads, bias=bias)(x)[0], expected, atol=3e-6)


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
def test_different_lengths(build: Build, kv_heads: int | None) -> None:
    """A sequence of any length, at once or token by token."""
    call = build(32, 4, kv_heads)
    for length in (1, 6):
        x = tokens(2, length, 32)
        whole, cache = call(x)
        assert whole.shape == x.shape
        parts, cache = [], None
        for t in range(length):
            part, cache = call(x[:, t : t + 1], cache)
            parts.append(part)
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-6)


def test_gqa_with_equal_kv_heads_is_mha(build: Build) -> None:
    x = tokens(1, 7, 32)
    np.testing.assert_array_equal(build(32, 4, 4)(x)[0], build(32, 4)(x)[0])


@pytest.mark.parametrize("kv_heads", [None, 1])
def test_rope(build: Build, kv_heads: int | None) -> None:
    """RoPE is relative: moving every position by as much changes nothing, another distance does."""
    call, x = build(32, 4, kv_heads), tokens(1, 6, 32)
    positions = np.arange(6, dtype=np.int32)[None]
    here, moved, apart = (call(x, positions=one)[0] for one in (positions, positions + 100, 2 * positions))
    np.testing.assert_allclose(moved, here, atol=2e-5)
    assert np.abs(apart - here).max() > 1e-3


def test_rope_with_gqa(build: Build) -> None:
    """With RoPE the order of the earlier tokens counts, without it the last token sees a set."""
    x = tokens(1, 6, 32)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    for rope, same in ((None, True), (RopeSpec(theta=10_000.0), False)):
        call = build(32, 4, 2, rope=rope)
        distance = np.abs(call(x)[0][:, -1] - call(swapped)[0][:, -1]).max()
        assert (distance < 1e-6) == same


def test_mqa(build: Build) -> None:
    """One KV head serves all query heads: the same as MHA in which every head has its keys and values."""
    x, spec = tokens(2, 5, 32), grouped(32, 4, 1, rope=RopeSpec(theta=10_000.0))
    weights = weights_of(spec)
    tied = {name: np.tile(value, (4, 1)) if name[0] in "kv" else value for name, value in weights.items()}
    many = grouped(32, 4, rope=RopeSpec(theta=10_000.0))
    np.testing.assert_allclose(build(32, 4, 1)(x)[0], oracle(many, tied, x), atol=3e-6)


def test_backward() -> None:
    """Both backends give every projection a gradient, and the same one."""
    spec = grouped(32, 4, 2, rope=RopeSpec(theta=10_000.0))
    x, weights = tokens(2, 5, 32), weights_of(spec)
    module = TorchModule(32, 4, 2)
    torch_run(module, weights)
    module(torch.tensor(x))[0].square().sum().backward()

    other = JaxModule(32, 4, 2, rngs=RNGS)
    jax_run(other, weights)
    found = nnx.grad(lambda m: jnp.square(m(jnp.asarray(x))[0]).sum())(other)
    gradients = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(found)}
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0
        np.testing.assert_allclose(gradients[name], parameter.grad.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("framework", RUNS)
def test_creation(framework: str) -> None:
    _, make, _ = RUNS[framework]
    assert make(32, 4).spec.num_key_value_heads == 4
    assert make(32, 4, 1).k_proj.weight.shape == (8, 32)
    assert make(32, 4, 1, head_dim=16, bias=True).q_proj.bias.shape == (64,)
    with pytest.raises(SpecError, match="not a multiple"):
        make(32, 4, 3)
    with pytest.raises(SpecError):
        make(32, 4, 0)
