"""A tiny Gemma3ForCausalLM around the layer under test, and the hooks that feed that layer and watch it.

The whole decoder runs: Hugging Face's mask builder, rotary embedding and cache, and another layer of the other kind
beside the one under test. Only what enters the layer's attention (or its injected block) is exchanged, by a hook, for
what the suite gives; what comes out is read by another.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3TextConfig, StaticCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from lyra.backends.protocol import Unsupported
from lyra.backends.torch_impl import GemmaInjector, LyraGemma3Attention
from lyra.spec.attention import AttentionSpec, RopeSpec, StaticSpec
from lyra.spec.split import HeadSplit

FULL, SLIDING = "full_attention", "sliding_attention"
ROOM = 160
"""Slots of a StaticCache, more than any case has live tokens; what is not used must not show."""

WIDE = 4096
"""The window of a sliding-window layer beside the one under test: it never fills."""

VOCABULARY = 8

Names = Mapping[str, torch.Tensor]


class Variant(NamedTuple):
    """How a layer is put into its model and run: one of each, chosen by its weights, so that cases see all of them."""

    cache: Literal["dynamic", "static"]
    attention: Literal["sdpa", "eager"]
    loaded: Literal["before", "after", "saved", "moved"]
    place: int
    lent: bool

    @classmethod
    def of(cls, weights: Mapping[str, np.ndarray]) -> Variant:
        """The same weights give the same one."""
        first = weights["q_proj.weight"]
        bits = zlib.crc32(np.ascontiguousarray(first).tobytes())
        kinds: tuple[Literal["before", "after", "saved", "moved"], ...] = ("before", "after", "saved", "moved")
        return cls(
            cache="static" if bits & 1 else "dynamic",
            attention="eager" if bits & 2 else "sdpa",
            loaded=kinds[bits >> 2 & 3],
            place=bits >> 4 & 1,
            lent=bool(bits & 32),
        )


class Feed(NamedTuple):
    """What a run of the model is given: x [B,T,E] enters the attention, h the injected block, where there is one."""

    x: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    h: torch.Tensor | None = None


@dataclass
class Seen:
    """What came out of the attention, or of the block, [B,T,E], and the stages on the way by their names."""

    output: torch.Tensor | None = None
    stages: dict[str, torch.Tensor] = field(default_factory=dict)


def config_of(spec: AttentionSpec, variant: Variant, other: Literal["kind", "same"] = "kind") -> Gemma3TextConfig:
    """The config of a model of two layers whose layer number `variant.place` is `spec`.

    The other one is of the other kind, with another theta, unless it is asked to be of the same.
    """
    assert spec.rope is not None
    assert spec.qk_norm is not None
    own = FULL if spec.sliding_window is None else SLIDING
    beside = own if other == "same" else {FULL: SLIDING, SLIDING: FULL}[own]
    ropes = {
        own: _rope(spec.rope),
        beside: _rope(spec.rope if beside == own else RopeSpec(theta=spec.rope.theta / 3 + 7)),
    }
    types = [own, beside] if variant.place == 0 else [beside, own]
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        # The class asks for a width that the heads divide, though Gemma-3 has its own head_dim: set below.
        hidden_size=spec.num_attention_heads * spec.head_dim,
        intermediate_size=8,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        num_hidden_layers=2,
        layer_types=types,
        rope_parameters=ropes,
        rms_norm_eps=spec.qk_norm.eps,
        query_pre_attn_scalar=max(1, round(spec.scale**-2)),  # an integer; the module gets the exact scale
        attention_bias=spec.bias,
        sliding_window=spec.sliding_window or WIDE,
        max_position_embeddings=131_072,
        attn_implementation=variant.attention,
    )
    config.hidden_size = spec.hidden_size
    return config


class Host:
    """A model of two layers, one of which is under test."""

    def __init__(self, spec: AttentionSpec, variant: Variant, other: Literal["kind", "same"] = "kind") -> None:
        self.spec, self.variant, self.place = spec, variant, variant.place
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(24)
            self.model = Gemma3ForCausalLM(config_of(spec, variant, other)).eval()
        self.injector = GemmaInjector(self.model)
        self.layer.self_attn.scaling = spec.scale

    @property
    def layer(self) -> Any:
        """The decoder layer under test."""
        return self.model.model.layers[self.place]

    @property
    def attention(self) -> Any:
        """Its attention."""
        return self.layer.self_attn

    def open_cache(self) -> Cache:
        """An empty cache of the variant's kind."""
        config = self.model.config
        return StaticCache(config, ROOM) if self.variant.cache == "static" else DynamicCache(config=config)

    def run(self, feed: Feed, cache: Cache | None, *, trace: bool = False) -> Seen:
        """The model over a feed, behind what the cache holds, which gets its tokens too."""
        seen = Seen()
        with self._hooked(feed, seen, trace):
            self.model.model(
                inputs_embeds=feed.x.detach(),
                attention_mask=feed.mask,
                position_ids=feed.positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return seen

    @contextmanager
    def _hooked(self, feed: Feed, seen: Seen, trace: bool) -> Iterator[None]:
        with ExitStack() as hooks:

            def keep(hook: Any) -> None:
                hooks.callback(hook.remove)

            def enter_attention(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
                return args, kwargs | {"hidden_states": feed.x}

            def enter_block(module: nn.Module, args: Any) -> Any:
                return (feed.h, *args[1:])

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                seen.output = output[0] if isinstance(output, tuple) else output

            keep(self.attention.register_forward_pre_hook(enter_attention, with_kwargs=True))
            if feed.h is None:
                keep(self.attention.register_forward_hook(leave))
            else:
                keep(self.layer.injected.register_forward_pre_hook(enter_block))
                keep(self.layer.injected.register_forward_hook(leave))
            target = self.attention if feed.h is None else self.layer.injected
            if trace:
                target.trace = seen.stages
                hooks.callback(setattr, target, "trace", None)
            yield


def tensors(weights: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Copies."""
    return {name: torch.tensor(value) for name, value in weights.items()}


def install(host: Host, spec: AttentionSpec, weights: Mapping[str, np.ndarray]) -> None:
    """Put LyraGemma3Attention with these weights into the host's layer, in the way that its variant says.

    before  the model has its weights, then the module comes
    after   the module comes into a model with other weights, and loads its own by their names in Hugging Face's
    saved   as before, and the module loads what it saves
    moved   the module comes with another split, is taken out, and comes again with this one
    It comes in the default live mode: what a context is attended to with, it is told with the context.
    """
    split = spec.split or HeadSplit.none()
    state, kind = tensors(weights), host.variant.loaded
    if kind != "after":
        host.attention.load_state_dict(state)
    if kind == "moved":
        scattered = HeadSplit.from_kv_heads(spec, range(0, spec.num_key_value_heads, 2))
        host.layer.self_attn = _around(host, spec.replace(split=scattered, sliding_window=None))
        host.layer.self_attn = host.attention.to_original()
    host.layer.self_attn = _around(host, spec.replace(split=split, static=StaticSpec()))
    if kind == "after":
        host.attention.load_state_dict(state)
    if kind == "saved":
        host.attention.load_state_dict({name: value.clone() for name, value in host.attention.state_dict().items()})


def _around(host: Host, spec: AttentionSpec) -> LyraGemma3Attention:
    return LyraGemma3Attention.around(host.attention, spec)


def cropped(cache: Cache, length: int) -> Cache:
    """A copy of the cache that has only its first `length` tokens, as transformers takes tokens back.

    Of a StaticCache it takes none back; here its count of tokens is set, and what stays in the slots behind must not
    show. Raises Unsupported for a sliding-window layer that has filled its window.
    """
    made = copy.deepcopy(cache)
    for layer in made.layers:
        held = int(layer.get_seq_length())
        if held <= length:
            continue
        if isinstance(layer, (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)) and held >= _window(layer):
            raise Unsupported(
                "a sliding-window layer of a transformers cache that has filled its window cannot be cropped"
            )
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.fill_(length)
            if isinstance(layer, StaticSlidingWindowLayer):
                layer.cumulative_length_int = length
        else:
            layer.crop(length - held)
    return made


def _window(layer: Any) -> int:
    return layer.max_cache_len if isinstance(layer, StaticLayer) else layer.sliding_window


def reordered(cache: Cache, rows: np.ndarray) -> Cache:
    """A copy of the cache with these rows, as beam search reorders it."""
    made = copy.deepcopy(cache)
    made.reorder_cache(torch.tensor(rows))
    return made


def _rope(rope: RopeSpec) -> dict[str, object]:
    if rope.factor == 1.0:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}
