"""A layer of a real Gemma3ForCausalLM with LyraGemma3Attention in it, as an `Attention`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from lyra.backends.protocol import Gradients, Result, Unsupported
from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError
from lyra.spec.inputs import (
    CallInputs,
    StaticLayer,
    check_call,
    check_cotangent,
    check_length,
    check_rows,
    check_weights,
)
from lyra.spec.split import HeadSplit

from .history import so_far
from .torch_host import ROOM, Feed, Host, Variant, cropped, install, reordered

LARGEST = 1e30
"""What padding may hold: beyond it Hugging Face's own projections overflow, and 0 times infinity is NaN."""


class ModuleCache(NamedTuple):
    """A transformers cache, the mask and positions [B,L] of its tokens, and the layer that filled it.

    `before` is the cache as it was when the last call came, and `fed` what that call brought.
    """

    hf: Cache
    mask: np.ndarray
    positions: np.ndarray
    owner: ModuleAttention | None = None
    before: ModuleCache | None = None
    fed: CallInputs | None = None


class ModuleAttention:
    """LyraGemma3Attention in a decoder layer of a model, as an `Attention`."""

    def __init__(self, spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> None:
        self.spec = spec
        self.weights = {name: array.copy() for name, array in check_weights(spec, weights).items()}
        self.host = Host(spec, Variant.of(weights))
        install(self.host, spec, self.weights)

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
        """Run the model over x in its layer. Shapes as in the protocol. Raises InputError, Unsupported."""
        inputs = check_call(self.spec, x, positions, mask, static)
        past = past_of(cache, inputs)
        after = followed(self, past, inputs)
        place_context(self.host, self.spec, inputs.static)
        with torch.inference_mode():
            seen = self.host.run(feed_of(inputs, after), after.hf, trace=trace)
        names = self.spec.trace_names() if trace else ()
        stages = {**seen.stages, "output": seen.output}
        return Result(leave(seen.output), after, {name: leave(stages[name]) for name in names})

    def vjp(
        self,
        cotangent: np.ndarray,
        x: np.ndarray,
        *,
        positions: np.ndarray,
        mask: np.ndarray | None = None,
        static: StaticLayer | None = None,
    ) -> Gradients:
        """Gradients of sum(cotangent · output) by autograd, the context being a trainable one. Raises as a call."""
        inputs = check_call(self.spec, x, positions, mask, static)
        given = torch.tensor(check_cotangent(cotangent, inputs))
        refuse(self.spec, None, inputs)
        place_context(self.host, self.spec, inputs.static, trainable=True)
        feed = feed_of(inputs, None)._replace(x=torch.tensor(inputs.x, requires_grad=True))
        self.host.model.zero_grad()
        with torch.enable_grad():
            seen = self.host.run(feed, None)
            assert seen.output is not None
            (seen.output * given).sum().backward()
        of_k, of_v = static_gradients(self.host.attention, static)
        return Gradients(leave(feed.x.grad), weight_gradients(self.host.attention, self.spec), of_k, of_v)

    def reorder(self, cache: object, rows: Sequence[int] | np.ndarray) -> ModuleCache:
        """The cache with these rows, by `Cache.reorder_cache`. Raises InputError."""
        own = _own(cache)
        chosen = check_rows(rows, len(own.mask))
        return ModuleCache(reordered(own.hf, chosen), own.mask[chosen], own.positions[chosen])

    def crop(self, cache: object, length: int) -> ModuleCache:
        """The first `length` tokens of the cache, by `Cache.crop`. Raises InputError."""
        own = _own(cache)
        length = check_length(length, own.mask.shape[1])
        return ModuleCache(cropped(own.hf, length), own.mask[:, :length], own.positions[:, :length])


def past_of(cache: object | None, inputs: CallInputs) -> ModuleCache | None:
    """A cache that goes on with a call. Raises InputError."""
    past = None if cache is None else _own(cache)
    if past is not None and len(past.mask) != len(inputs.mask):
        raise InputError(f"the cache has {len(past.mask)} rows, x has {len(inputs.mask)}; reorder it first")
    return past


def followed(layer: ModuleAttention, past: ModuleCache | None, inputs: CallInputs) -> ModuleCache:
    """A cache that is ready for the call's tokens: a copy of the one before, or an empty one. Raises Unsupported."""
    refuse(layer.spec, past, inputs)
    if past is not None and layer.spec.sliding_window == 1 and isinstance(past.hf, DynamicCache):
        raise Unsupported(
            "of a window of 1 transformers' DynamicCache forgets nothing: it keeps the last -0 tokens, all"
        )
    hf = layer.host.open_cache() if past is None else copy.deepcopy(past.hf)
    return ModuleCache(hf, *so_far(past, inputs), layer, past, inputs)


def feed_of(inputs: CallInputs, after: ModuleCache | None) -> Feed:
    """What the model is given: no mask where no token of the cache is padding, as `generate` leaves it out."""
    mask = inputs.mask if after is None else after.mask
    gaps = after is None and bool((np.diff(inputs.positions, axis=1) != 1).any())  # taken for packed sequences
    shown = torch.tensor(mask) if gaps or not mask.all() else None
    return Feed(torch.tensor(inputs.x), torch.tensor(inputs.positions), shown)


def refuse(spec: AttentionSpec, past: ModuleCache | None, inputs: CallInputs) -> None:
    """Raise Unsupported for what a model of Hugging Face's cannot be given."""
    padding = np.abs(inputs.x[~inputs.mask]).max(initial=0)
    if padding > LARGEST:
        raise Unsupported(f"padding of more than {LARGEST:g} overflows in Hugging Face's own projections")
    mask, positions = so_far(past, inputs)
    if mask.shape[1] > ROOM:
        raise Unsupported(f"the model's StaticCache is opened for {ROOM} tokens")
    if spec.sliding_window is not None and not consecutive(positions, mask):
        raise Unsupported("Hugging Face counts a window in the slots of its cache, not in positions")


def consecutive(positions: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the real tokens of every row stand side by side, at positions one after the other; both [B,L]."""
    for row, shown in zip(positions, mask, strict=True):
        places = np.flatnonzero(shown)
        if (np.diff(places) != 1).any() or (np.diff(row[places]) != 1).any():
            return False
    return True


def place_context(host: Host, spec: AttentionSpec, static: StaticLayer | None, *, trainable: bool = False) -> None:
    """Give the layer the context of a call, or none, through the injector; a layer without Lyra heads has none."""
    if not spec.lyra_q_heads:
        return
    assert spec.split is not None
    given = {} if static is None else {host.place: static}
    host.injector.place(given, {host.place: spec.split}, spec.static, trainable=trainable and static is not None)


def static_gradients(attention: object, static: StaticLayer | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Gradients of a trainable context in the shape of what was given, 0 where the module has left hidden slots out."""
    if static is None:
        return None, None
    found = []
    for name, whole in (("static_k", static.k), ("static_v", static.v)):
        made, part = np.zeros(whole.shape, np.float32), getattr(attention, name)
        if part is not None and part.grad is not None:
            kept = static.mask[0] if part.shape[2] < whole.shape[2] else np.ones(whole.shape[2], dtype=bool)
            made[:, :, kept] = part.grad.numpy()
        found.append(made)
    return found[0], found[1]


def weight_gradients(attention: torch.nn.Module, spec: AttentionSpec) -> dict[str, np.ndarray]:
    """Gradients by Hugging Face's names, those of the parts of a projection put together by their heads."""
    found = {}
    lyra = (spec.split or HeadSplit.none()).bind(spec).lyra_kv_heads if spec.split else ()
    streams = {"lyra": list(lyra), "vanilla": [head for head in range(spec.num_key_value_heads) if head not in lyra]}
    parameters = dict(attention.named_parameters())
    for name, shape in spec.weight_shapes().items():
        made = np.zeros(shape, np.float32)
        if name in parameters:
            made += leave(parameters[name].grad)
        else:
            by_head = made.reshape(spec.num_key_value_heads, spec.head_dim, *shape[1:])
            for stream, heads in streams.items():
                if heads:
                    part = leave(parameters[f"{stream}_{name}"].grad)
                    by_head[heads] = part.reshape(len(heads), spec.head_dim, *shape[1:])
        found[name] = made
    return found


def leave(value: torch.Tensor | None) -> np.ndarray:
    """A copy in NumPy."""
    assert value is not None
    return np.ascontiguousarray(value.detach().numpy().copy(), np.float32)


def _own(cache: object) -> ModuleCache:
    if not isinstance(cache, ModuleCache):
        raise InputError(f"cache is a {type(cache).__name__}; expected what an earlier call of this backend returned")
    return cache
