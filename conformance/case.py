"""A case: everything one comparison needs, small enough to shrink, to print and to write into a replay file."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lyra.spec.attention import AttentionSpec
from lyra.spec.bfloat16 import to_bfloat16
from lyra.spec.inputs import Dtype, StaticLayer
from lyra.spec.sequential import SequentialSpec, Source
from lyra.spec.split import HeadSplit

from .random_arrays import RandomArrays

Flavour = Literal["normal", "offset", "peaked", "small", "large"]
FLAVOURS: dict[Flavour, str] = {
    "normal": "inputs and weights as a trained layer's: unit variance, random norm weights",
    "offset": "inputs with a mean far from zero",
    "peaked": "scores so far apart that a softmax is nearly one-hot",
    "small": "inputs so small that eps decides the norm",
    "large": "inputs of size 1,000",
}


STRIDE = 0x9E3779B9
"""Between the seeds of the data that one case is checked with: far from the small seeds that shrinking ends at."""


@dataclass(frozen=True)
class Context:
    """A static context: tokens slots, `batch` 1 or the case's, the first slot's position, and what is hidden.

    `hidden` slots per row are masked, chosen by the seed; with `gaps` the positions have holes between them.
    """

    tokens: int
    batch: int = 1
    start: int = 0
    hidden: tuple[int, ...] = (0,)
    gaps: bool = False

    def replace(self, **changes: Any) -> Context:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class Block:
    """What an injected block puts around an attention (clause SEQUENTIAL); the fields are those of a SequentialSpec."""

    residual: bool = True
    gate: float = 0.0
    norm_eps: float = 1e-6
    output_norm: bool = True
    source: Source = "external"

    def replace(self, **changes: Any) -> Block:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def around(self, spec: AttentionSpec) -> SequentialSpec:
        """The block with this attention in it; one that shares its layer's cache has no Lyra heads."""
        inner = spec.replace(split=None) if self.source == "own" else spec
        return SequentialSpec(attention=inner, **dataclasses.asdict(self))


def described(spec: AttentionSpec, block: Block | None) -> AttentionSpec | SequentialSpec:
    """What a backend makes: an attention, or the block around it."""
    return spec if block is None else block.around(spec)


@dataclass(frozen=True)
class Case:
    """One attention layer, its data (from `seed` and `flavour`) and the way its tokens are cut into calls.

    calls     live tokens of each call; their sum is T
    padding   padding tokens per row, on the left or right of the whole sequence
    start     position of the first real token of every row
    poison    the value that every masked slot holds: padding inputs, hidden static keys and values
    dtype     what the layer computes in; with "bfloat16" all data are values of that type (clause DTYPE)
    block     the injected block whose attention `spec` is, or None: the layer itself
    """

    spec: AttentionSpec
    calls: tuple[int, ...] = (4,)
    batch: int = 1
    context: Context | None = None
    padding: tuple[int, ...] = ()
    padding_side: Literal["left", "right"] = "left"
    start: int = 0
    flavour: Flavour = "normal"
    poison: float = 1e4
    seed: int = 0
    dtype: Dtype = "float32"
    block: Block | None = None

    def replace(self, **changes: Any) -> Case:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def respec(self, **changes: Any) -> Case:
        """A copy with some fields of the spec changed."""
        return self.replace(spec=self.spec.replace(**changes))

    def with_other_data(self, index: int) -> Case:
        """The case with the data of another seed, which follows from its own; `index` 0 gives the case itself."""
        return self.replace(seed=(self.seed + index * STRIDE) % 2**32)

    def hiding(self) -> Case:
        """A copy in which every row hides something: padding tokens, and slots of its context, which it must have."""
        assert self.context is not None
        hidden = tuple(max(1, count) for count in self.context.hidden)
        padding = self.padding or (self.tokens // 2,) * self.batch
        return self.replace(padding=padding, context=self.context.replace(hidden=hidden))

    @property
    def described(self) -> AttentionSpec | SequentialSpec:
        """What a backend makes of it: an attention, or the block around it."""
        return described(self.spec, self.block)

    @property
    def tokens(self) -> int:
        """T, the live tokens of all calls."""
        return sum(self.calls)

    def problem(self) -> Problem:
        """The arrays of this case."""
        return make_problem(self)

    def describe(self) -> str:
        """One line that a person can picture."""
        spec = self.spec
        parts = [f"{spec.num_attention_heads} Q / {spec.num_key_value_heads} KV heads of {spec.head_dim}"]
        parts.append(f"hidden {spec.hidden_size}")
        parts.append(f"{self.batch} row{'s' * (self.batch > 1)}, calls of {'+'.join(map(str, self.calls))} tokens")
        if self.start:
            parts.append(f"from position {self.start}")
        if any(self.padding):
            parts.append(f"{self.padding_side} padding {self.padding}")
        if spec.lyra_q_heads:
            parts.append(f"Lyra heads {spec.lyra_q_heads}{' sharing KV' if spec.split and spec.split.share_kv else ''}")
            parts.append(f"live={spec.static.live!r} positions={spec.static.positions!r}")
        if self.context is not None:
            parts.append(f"static {self.context.tokens} tokens × {self.context.batch}, hidden {self.context.hidden}")
        if spec.sliding_window:
            parts.append(f"window {spec.sliding_window}")
        if self.block is not None:
            fields = dataclasses.asdict(self.block).items()
            parts.append(f"in a block with {', '.join(f'{name}={value!r}' for name, value in fields)}")
        parts.append(f"{self.flavour} data, seed {self.seed}")
        if self.dtype != "float32":
            parts.append(f"in {self.dtype}")
        return "; ".join(parts)

    def to_json(self) -> str:
        """The case as JSON text."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        fields["spec"] = self.spec.to_dict()
        for name in ("context", "block"):
            fields[name] = dataclasses.asdict(fields[name]) if fields[name] else None
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case a JSON text describes. Raises ValueError (SpecError among them)."""
        fields = json.loads(text)
        try:
            spec = AttentionSpec.from_dict(fields.pop("spec"))
            context = fields.pop("context", None)
            for name in ("calls", "padding"):
                fields[name] = tuple(fields.get(name, ()))
            if context is not None:
                context = Context(**(context | {"hidden": tuple(context.get("hidden", (0,)))}))
            block = fields.pop("block", None)
            return cls(spec=spec, context=context, block=None if block is None else Block(**block), **fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a case: {error}") from None


@dataclass(frozen=True)
class Problem:
    """The arrays of a case: what goes into the calls, for all live tokens of the sequence at once.

    With a block, `spec` is that of its attention, x is h, and `own` is the layer whose cache a block with source "own"
    reads, called with the same tokens.
    """

    spec: AttentionSpec
    weights: dict[str, np.ndarray]
    x: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    static: StaticLayer | None
    calls: tuple[int, ...]
    dtype: Dtype = "float32"
    block: Block | None = None
    own: Problem | None = None
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def replace(self, **changes: Any) -> Problem:
        """A copy with some arrays changed; nothing remembered about the old one is kept."""
        return dataclasses.replace(self, **{"memo": {}, **changes})

    def respec(self, **changes: Any) -> Problem:
        """A copy with some fields of the spec changed."""
        return self.replace(spec=self.spec.replace(**changes))

    def with_split(self, split: HeadSplit | None) -> Problem:
        """A copy with another split; the static layer must suit it, or be replaced too."""
        return self.respec(split=split)

    def same_as(self, other: Problem) -> bool:
        """Whether two problems ask the same of a layer, however their tokens are cut into calls."""
        if (self.dtype, self.block) != (other.dtype, other.block) or self.spec != other.spec:
            return False
        if (self.static is None, self.own is None) != (other.static is None, other.own is None):
            return False
        ours, theirs = self._arrays(), other._arrays()
        same = ours.keys() == theirs.keys() and all(_same(ours[name], theirs[name]) for name in ours)
        return same and (self.own is None or other.own is None or self.own.same_as(other.own))

    def _arrays(self) -> dict[str, np.ndarray]:
        static = {} if self.static is None else {f"static {name}": a for name, a in self.static._asdict().items()}
        return {"x": self.x, "positions": self.positions, "mask": self.mask, **static, **self.weights}

    def part(self, tokens: slice | list[int], calls: tuple[int, ...]) -> Problem:
        """Some of the live tokens, a slice or their numbers, cut into `calls`."""
        return self.replace(
            x=self.x[:, tokens],
            positions=self.positions[:, tokens],
            mask=self.mask[:, tokens],
            calls=calls,
            own=None if self.own is None else self.own.part(tokens, calls),
        )

    def rounded(self) -> Problem:
        """A copy whose arrays hold the nearest bfloat16 values."""
        static = self.static
        if static is not None:
            static = static._replace(k=to_bfloat16(static.k), v=to_bfloat16(static.v))
        weights = {name: to_bfloat16(value) for name, value in self.weights.items()}
        return self.replace(weights=weights, x=to_bfloat16(self.x), static=static)

    @property
    def entered(self) -> Problem:
        """What a layer computes with: in bfloat16 the nearest values of that type to what comes in (DTYPE-1)."""
        if self.dtype == "float32":
            return self
        if "entered" not in self.memo:
            self.memo["entered"] = self.rounded()
        found: Problem = self.memo["entered"]
        return found

    @property
    def described(self) -> AttentionSpec | SequentialSpec:
        """What a backend makes of it: an attention, or the block around it."""
        return described(self.spec, self.block)

    @property
    def real(self) -> np.ndarray:
        """[B,T] bool: where the output is specified (MASKED-4)."""
        return self.mask


def _same(first: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays hold the same bits: NaN equals itself, and the zeros of either sign differ."""
    return first is other or (
        first.dtype == other.dtype and first.shape == other.shape and first.tobytes() == other.tobytes()
    )


def make_problem(case: Case) -> Problem:
    """Draw the arrays of a case from its seed. The same case gives the same bits on every machine."""
    rng = np.random.default_rng([case.seed, 20])
    random = RandomArrays(rng)
    weights = _weights(case, random)
    batch, tokens = case.batch, case.tokens
    x = _inputs(case, rng, random, (batch, tokens, case.spec.hidden_size))
    mask = np.ones((batch, tokens), dtype=bool)
    for row, count in enumerate(case.padding):
        mask[row, slice(0, count) if case.padding_side == "left" else slice(tokens - count, tokens)] = False
    positions = case.start + np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    x[~mask] = np.where(rng.random(x[~mask].shape) < 0.5, case.poison, -case.poison)
    static = _static(case, rng, random) if case.context is not None else None
    problem = Problem(case.spec, weights, x, positions, mask, static, case.calls, case.dtype, case.block)
    if case.block is not None and case.block.source == "own":
        own = make_problem(case.replace(block=None, seed=case.seed + 1))  # other data, the same tokens
        problem = problem.replace(spec=case.spec.replace(split=None), static=None, own=own)
    return problem if case.dtype == "float32" else problem.rounded()


def _weights(case: Case, random: RandomArrays) -> dict[str, np.ndarray]:
    """Weights as a trained layer has them; norm weights are never zero, which would hide their place in the order."""
    weights = {}
    for name, shape in case.described.weight_shapes().items():
        if name.endswith("norm.weight"):
            spread = 2.0 if case.flavour == "peaked" else 0.5
        elif name.endswith("bias"):
            spread = 0.5
        else:
            unnormed = case.spec.qk_norm is None and name[0] in "qk"
            gain = {"peaked": 3.0, "large": 3e-3}.get(case.flavour, 1.0) if unnormed else 1.0
            spread = gain / math.sqrt(shape[1])
        weights[name] = random.normal(shape)
        weights[name] *= np.float32(spread)
    return weights


def _inputs(case: Case, rng: np.random.Generator, random: RandomArrays, shape: tuple[int, ...]) -> np.ndarray:
    x = random.normal(shape)
    if case.flavour == "offset":
        x += 3.0 * random.normal(shape[-1:])
    elif case.flavour == "small":
        x *= (10.0 ** rng.uniform(-5, -2, (*shape[:2], 1))).astype(np.float32)
    elif case.flavour == "large":
        x *= 1e3
    return x


def _static(case: Case, rng: np.random.Generator, random: RandomArrays) -> StaticLayer:
    """A context as capturing gives it: keys of the size k_norm leaves them, poison in masked slots."""
    context = case.context
    assert context is not None
    rows, slots = context.batch, context.tokens
    shape = (rows, len(case.spec.lyra_kv_heads), slots, case.spec.head_dim)
    gain = 1.0 + (2.0 if case.flavour == "peaked" else 0.5) * random.normal(shape[-1:])
    k, v = random.normal(shape) * gain, random.normal(shape)
    mask = np.ones((rows, slots), dtype=bool)
    for row in range(rows):
        hidden = min(context.hidden[row % len(context.hidden)], slots)
        mask[row, rng.permutation(slots)[:hidden]] = False
    steps = rng.integers(1, 4, (rows, slots)) if context.gaps else np.ones((rows, slots), dtype=np.int64)
    positions = context.start + np.cumsum(steps, axis=1) - steps[:, :1] if slots else np.zeros((rows, 0), np.int64)
    hidden_slots = np.broadcast_to(~mask[:, None, :, None], shape)
    k[hidden_slots], v[hidden_slots] = case.poison, -case.poison
    return StaticLayer(k, v, mask, positions.astype(np.int64))
