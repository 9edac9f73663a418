"""What a backend is: the protocol of the attention level and of the model level, and what finds a backend.

NumPy at the boundary, so that a suite, a command line or another backend can talk to any of them.
A third-party backend implements `Backend` and `Attention`; the model level is optional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from lyra.spec.attention import AttentionSpec, StaticSpec
from lyra.spec.errors import InputError
from lyra.spec.inputs import StaticLayer
from lyra.spec.model import ModelSpec
from lyra.spec.sequential import SequentialSpec
from lyra.spec.split import HeadSplit

from .registry import (
    CAPABILITIES,
    BackendEnded,
    BackendNotFound,
    check_backend,
    get_backend,
    import_extra,
    known_backends,
    known_subjects,
)
from .sampling import Sampling

__all__ = [
    "CAPABILITIES",
    "Attention",
    "AttentionsEngine",
    "Backend",
    "BackendEnded",
    "BackendNotFound",
    "Bfloat16Backend",
    "BlendedEngine",
    "BlendedText",
    "CapturedLayer",
    "DifferentiableAttention",
    "Engine",
    "FixedBackend",
    "GatedEngine",
    "GatedText",
    "Gradients",
    "MeshBackend",
    "ModelBackend",
    "PlacedBackend",
    "Result",
    "Sampling",
    "SequentialBackend",
    "SequentialEngine",
    "StaticLayer",
    "Unsupported",
    "check_backend",
    "get_backend",
    "import_extra",
    "known_backends",
    "known_subjects",
]


class Unsupported(Exception):
    """What a layer raises that by its nature cannot be asked something, such as positions that a model counts itself.

    The message says what. The suite leaves the case out for this backend, as it does one that does not fit.
    """


class Result(NamedTuple):
    """output [B, T, E] float32; cache: opaque, goes into the next call; trace: stage name -> array, or empty."""

    output: np.ndarray
    cache: object
    trace: dict[str, np.ndarray]


class Gradients(NamedTuple):
    """What `Attention.vjp` returns; static_k and static_v are None without a static layer."""

    x: np.ndarray
    weights: dict[str, np.ndarray]
    static_k: np.ndarray | None
    static_v: np.ndarray | None


@runtime_checkable
class Attention(Protocol):
    """One attention layer with its weights.

    x [B,T,E] float32; positions [B,T] int, strictly increasing over the real tokens of a row; mask [B,T] bool
    (False = padding); static: StaticLayer or None; cache: what an earlier Result returned, or None. A call never
    changes the cache it is given. It reads the arrays it is given, writes to none and keeps none (clause ARRAYS).
    """

    def __call__(
        self,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
        cache: object | None = None,
        trace: bool = False,
    ) -> Result: ...


@runtime_checkable
class DifferentiableAttention(Attention, Protocol):
    """What an attention layer is with the capability "grad" (clause GRAD)."""

    def vjp(
        self,
        cotangent: np.ndarray,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
    ) -> Gradients:
        """Gradients of sum(cotangent * output), in the shapes of what they belong to; cotangent [B,T,E] float32.

        The cotangent at padding counts as 0; gradients of padding inputs and of masked static slots are exactly 0.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """A named maker of attention layers. `weights` carry Hugging Face names and layouts, float32."""

    name: str
    capabilities: frozenset[str]

    def attention(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> Attention: ...


@runtime_checkable
class FixedBackend(Backend, Protocol):
    """A backend whose layers have one structure, as a module of a framework has: what differs is not asked of it."""

    def fits(self, spec: AttentionSpec | SequentialSpec) -> str | None:
        """None for a spec that it can be asked to make, else in a few words what does not fit: "a bias"."""
        ...


@runtime_checkable
class PlacedBackend(Backend, Protocol):
    """A backend that says what it computes on; reports name it, for the same code rounds otherwise elsewhere."""

    @property
    def hardware(self) -> str:
        """In a few words, such as "CPU" or "NVIDIA H200"."""
        ...


class Bfloat16Backend(Backend, Protocol):
    """What a backend is with the capability "bfloat16" (clause DTYPE)."""

    def attention(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray], *, dtype: str = "float32") -> Attention:
        """A layer that computes in `dtype`, "float32" or "bfloat16"; another one raises InputError.

        The boundary is the same for both: float32 arrays come in, which a bfloat16 layer rounds, and float32 arrays
        go out, whose values are then bfloat16 ones.
        """
        ...


@runtime_checkable
class SequentialBackend(Backend, Protocol):
    """What a backend is with the capability "sequential" (clause SEQUENTIAL).

    The block is called as an Attention is, x being the residual stream h. With spec.source "own", `cache` is what the
    layer's own Attention of this backend returned for the same tokens, and comes back as it is. `weights` go by
    `spec.weight_shapes()`, float32.
    """

    def sequential(self, spec: SequentialSpec, weights: Mapping[str, np.ndarray]) -> Attention: ...


class CapturedLayer(NamedTuple):
    """What capturing one layer gives: k, v [1, Hkv, S, D] float32, k normed and unrotated (clause STORED)."""

    k: np.ndarray
    v: np.ndarray


class Engine(Protocol):
    """A whole model in one framework: token ids in, NumPy out. Text, files and splits are the front door's business.

    ids [B,T] int; mask [B,T] bool (False = padding, on the left for generation) or None. What is NaN or infinite in an
    answer, padding aside, is raised as NotFiniteError and never returned.
    """

    module: Any

    @property
    def spec(self) -> ModelSpec:
        """What the model does; no split, whatever is attached."""
        ...

    def logits(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float32 [B,T,V]."""
        ...

    def log_probs(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float32 [B,T-1]: natural logarithm of the probability of ids[:, 1:], each given all before it."""
        ...

    def generate(
        self,
        ids: np.ndarray,
        mask: np.ndarray | None = None,
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        on_token: Callable[[np.ndarray], None] | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> np.ndarray:
        """The continuation, int [B,N], N <= max_new_tokens; rows that stopped early repeat their stop token.

        Each token is the most likely one, or with `sampling` one drawn from that distribution, independently for each
        row. The same call with the same `seed`, from 0 to 2**32 - 1, gives the same tokens in one backend; another
        backend draws others. `on_token` is called with int [B] after each step.
        """
        ...

    def capture(
        self,
        ids: np.ndarray,
        layers: Sequence[int],
        *,
        chunk_size: int = 512,
        on_chunk: Callable[[int], None] | None = None,
    ) -> dict[int, CapturedLayer]:
        """Run the unmodified model over ids [1,S] in chunks and keep K/V of some layers (clause CAPTURE).

        `on_chunk` is called with the number of tokens done. Raises InputError while a context is attached.
        """
        ...

    def attach(self, static: Mapping[int, StaticLayer], splits: Mapping[int, HeadSplit], mode: StaticSpec) -> None:
        """Give layers their static K/V and head split; keys are rotated once, here. Replaces what was attached."""
        ...

    def detach(self) -> None:
        """Back to the unmodified model."""
        ...

    def attention_weights(self, layer: int) -> dict[str, np.ndarray]:
        """Float32 copies of a layer's attention weights, in Hugging Face names and layout."""
        ...


@runtime_checkable
class SequentialEngine(Engine, Protocol):
    """What an engine is whose backend has the capability "inject" (clause SEQUENTIAL, in whole models)."""

    def inject(self, static: Mapping[int, StaticLayer], blocks: Mapping[int, SequentialSpec]) -> None:
        """Put a block behind the self-attention of each layer of `blocks`, with the layer's weights (SEQUENTIAL-7).

        `static` has the context of each block; keys are rotated once, here. Replaces what was attached, and `detach`
        takes it out.
        """
        ...

    def set_gates(self, gates: Mapping[int, float]) -> None:
        """Change the gates of injected blocks, by layer; raises InputError for a layer without one."""
        ...


@runtime_checkable
class AttentionsEngine(Engine, Protocol):
    """What an engine is that shows what its heads look at, by a slow path on request."""

    def attentions(
        self, ids: np.ndarray, mask: np.ndarray | None = None, *, layers: Sequence[int]
    ) -> dict[int, np.ndarray]:
        """By layer the softmax weights of its heads, float32 [B,Hq,T,S+T], for ids [B,T].

        The S slots of the context that the layer's heads read stand first, hidden ones among them; where they read none
        S is 0. Exactly 0 are the slots for a head that does not read them, what is hidden, the rows of padding, and a
        row that sees nothing; any other row adds up to 1. Injected blocks are not looked into.
        """
        ...


class BlendedText(Protocol):
    """A text behind a context, of whose L layers every query head has a blend.

    A blend b mixes what the head gives with the context and without it, b·with + (1 − b)·without: 1 is a Lyra head of
    the default modes (live "causal", positions "continue"), 0 a vanilla head. Layers are in ascending order.
    """

    def nll(self, blends: np.ndarray, /) -> np.ndarray:
        """Mean NLL in nats of the scored tokens, float64 [C], for each of C candidates, blends [C,L,Hq]."""
        ...

    def gradient(self, blends: np.ndarray, /) -> tuple[float, np.ndarray]:
        """The mean NLL under blends [L,Hq], and its gradient with respect to them, float64 [L,Hq]."""
        ...


@runtime_checkable
class BlendedEngine(Engine, Protocol):
    """What an engine is whose backend has the capability "blends"."""

    def blended(self, ids: np.ndarray, scored: int, static: Mapping[int, StaticLayer]) -> BlendedText:
        """Ids [1,T], of which the last `scored` are scored, behind a context that holds all KV heads of its layers.

        Raises InputError while a context is attached, and for what does not fit.
        """
        ...


GatedText = BlendedText
"""Another name of it."""


@runtime_checkable
class GatedEngine(Engine, Protocol):
    """A BlendedEngine by other names: its backend may call the capability "gates", and it the method `gated`."""

    def gated(self, ids: np.ndarray, scored: int, static: Mapping[int, StaticLayer]) -> BlendedText:
        """What `BlendedEngine.blended` says."""
        ...


def blended_text(engine: Engine, ids: np.ndarray, scored: int, static: Mapping[int, StaticLayer]) -> BlendedText:
    """The text that an engine makes, by whichever of the two names. Raises InputError for an engine with neither."""
    if isinstance(engine, BlendedEngine):
        return engine.blended(ids, scored, static)
    if isinstance(engine, GatedEngine):
        return engine.gated(ids, scored, static)
    raise InputError(f"a {type(engine).__name__} has no method 'blended'; take a backend with the capability 'blends'")


@runtime_checkable
class ModelBackend(Backend, Protocol):
    """A backend that also loads whole models, from a folder in Hugging Face's layout (config.json, *.safetensors)."""

    def load(self, folder: str, *, dtype: str = "float32", device: str | None = None) -> Engine: ...


class MeshBackend(ModelBackend, Protocol):
    """What a backend is with the capability "mesh" (clause MESH); a mesh is the framework's own."""

    def mesh(self, axes: Mapping[str, int]) -> Any:
        """A mesh of the first devices of this process, so many along each axis: `{"heads": 2, "context": 2}`.

        Raises InputError where there are fewer.
        """
        ...

    def environment(self, devices: int) -> Mapping[str, str]:
        """Environment variables with which a new process has so many devices, virtual ones if need be."""
        ...

    def load(
        self, folder: str, *, dtype: str = "float32", device: str | None = None, mesh: Any | None = None
    ) -> Engine: ...
