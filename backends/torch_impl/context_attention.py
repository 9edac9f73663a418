"""The attention module that takes the place of Hugging Face's in a layer with a static context.

PyTorch alone: in JAX what is attached is an argument of the model's own layer. What runs is `run_layer`, as everywhere;
here is what Hugging Face wants of a module: its config, masks and cache, its state dict, and the submodules, which are
the original's, so that no parameter is copied but rows of scattered heads. The live cache gets all heads, so that every
cache type, beam search and assisted decoding keep working. The context lives in the module, never in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lyra.spec.attention import AttentionSpec, StaticSpec
from lyra.spec.context import StaticContext
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from .attention_kinds import check_gives_weights, check_kind
from .attentions import attentions, show_slots
from .cache import Keys
from .hf_cache import ModelCache, SlotKeys
from .layer import Call, Layer, Numbers, Parts, norm, note, output, project, rope, run_layer, shape_of
from .offload import device_of
from .rope import cos_sin, inverse_frequencies, rotate
from .split_projections import TUNED, SplitProjections
from .static import StaticKV

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ContextAttention(SplitProjections):
    """What makes a module of Hugging Face's attention one whose Lyra heads also attend to a static context.

    A class of a model family inherits from this one and from Hugging Face's, and says by the class variables what that
    one is made of. Its projections are in two parts, see `SplitProjections`. The context's tensors are buffers, its
    keys and values parameters while they are tuned: they follow `.to`, and stay out of the state dict. Clauses SPLIT,
    STATIC, LIVE.

    `trace` is a dictionary that every call writes its stages to, by the names of `lyra.spec.attention.TRACES`, or None;
    `blend` float32 [B,Hq] blends each head with and without the context, or is None.
    """

    rotary: ClassVar[Callable[..., tuple[torch.Tensor, torch.Tensor]]]
    """How Hugging Face turns q and k [B,H,T,D], by cos and sin [B,T,D]."""
    eager: ClassVar[Callable[..., Any]]
    """Hugging Face's attention function of the name "eager"."""

    scaling: float
    attention_dropout: float
    static_k: torch.Tensor | None
    static_v: torch.Tensor | None
    static_visible: torch.Tensor | None
    static_positions: torch.Tensor | None

    def __init__(
        self, config: Any, layer_idx: int, *, split: HeadSplit | None = None, static: StaticSpec | None = None
    ) -> None:
        """`split` is by default the half of the heads that `HeadSplit.half` names; `static` says what Lyra heads see.

        Raises SpecError for a sliding-window layer with Lyra heads and for a split that does not fit.
        """
        spec = ModelSpec.from_hf_config(config.to_dict()).layer(layer_idx)
        split = HeadSplit.half(spec) if split is None else split
        super().__init__(config, layer_idx, spec.replace(split=split, static=static or StaticSpec()))
        self.trace: dict[str, torch.Tensor] | None = None
        self.blend: torch.Tensor | None = None
        self.static_group: ProcessGroup | None = None
        self.static_rows = 0
        self.given: StaticContext | None = None  # the whole context, of which static_k and static_v are this layer's
        self.shown: np.ndarray | None = None  # which of its slots, bool [S], static_k and static_v are of; None for all
        for name in ("static_k", "static_v", "static_visible", "static_positions"):
            self.register_buffer(name, None, persistent=False)

    @classmethod
    def around(cls, original: Any, spec: AttentionSpec) -> Self:
        """The module that stands in for `original`, whose weights it shares; `spec` is the layer's, with its split."""
        with torch.device("meta"):
            made = cls(original.config, original.layer_idx, split=HeadSplit.none())
        made.spec = spec  # of this process's heads only, where others have the rest (tensor parallel)
        made.load_weights_from_original(original)
        return made

    def attend_to(
        self,
        static: StaticKV | None,
        mode: StaticSpec,
        *,
        trainable: bool = False,
        mask: np.ndarray | None = None,
    ) -> None:
        """Put a prepared context, or none, in the place of the present one; `mask` [Bc,S] is that of all its slots.

        With `trainable` its keys have not been rotated yet; they and its values become parameters, in float32, and are
        rotated in every call (clauses STORED-2, GRAD).
        """
        self.given = None
        self.shown = None if mask is None or len(mask) > 1 or mask.all() else mask[0]
        device, dtype = device_of(self.anchor), self.anchor.get_parameter("weight").dtype
        self.spec = self.spec.replace(static=mode)
        self.place_heads(self.spec, device)
        self.static_trainable = trainable and static is not None
        self.static_rows = 0 if static is None else len(static.keys)
        k, v, visible, positions, self.static_group = static or (None,) * 5
        for name, value in zip(TUNED, (k, v), strict=True):
            delattr(self, name)
            if value is not None and trainable:
                self.register_parameter(name, nn.Parameter(value.to(device, torch.float32)))
            else:
                self.register_buffer(name, None if value is None else value.to(device, dtype), persistent=False)
        self.static_visible = None if visible is None else visible.to(device)
        self.static_positions = None if positions is None else positions.to(device)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [B,T,E] -> [B,T,E]; live tokens at the positions of `position_embeddings`, all heads alike.

        With `output_attentions`, also what the heads look at, as in `look`; it changes nothing. Hugging Face's own
        attention runs where there is no context, and gives what it gives. Raises InputError for a call that the layer
        cannot serve.
        """
        batch, tokens = hidden_states.shape[:2]
        self._check_batch(batch)
        if self._is_plain(attention_mask, tokens, past_key_values):
            return self._attend_plainly(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        check_kind(self.config._attn_implementation)
        if asked := kwargs.get("output_attentions") or self.config.output_attentions:
            check_gives_weights(self.config._attn_implementation)
        if self.training and self.attention_dropout:
            raise InputError(
                f"attention_dropout={self.attention_dropout} while training: a layer with a static context has none; "
                f"set it to 0 in the config, before the model is made"
            )
        cache = ModelCache(past_key_values, self.layer_idx, attention_mask)
        layer, call = self.layer, self.call(position_embeddings, cache)
        trace = {} if asked and self.trace is None else self.trace
        result, _ = run_layer(hidden_states, layer, call, trace)
        if not asked or trace is None or cache.live is None:
            return result, None
        q = trace["q_rope"]
        return result, self._weights(q, cache.live, layer, call).to(q.dtype)

    def look(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **others: object,
    ) -> torch.Tensor:
        """What the heads look at in a call without a cache: their softmax weights, float32 [B,Hq,T,S+T].

        The S slots of the context stand first. A head that does not read it has 0 there; so has a hidden slot, and a
        query that sees nothing has 0 everywhere.
        """
        layer, call = self.layer, self.call(position_embeddings, None)
        q, k, v = project(hidden_states, layer)
        q, k = rope(*norm(q, k, layer), layer, call)
        assert k is not None
        assert v is not None
        live = SlotKeys(k.transpose(1, 2), v.transpose(1, 2), attention_mask, q.shape[1], 0)
        return self._weights(q, live, layer, call)

    @property
    def layer(self) -> Layer:
        """What it computes with now: its submodules, whatever has been wrapped, and the numbers of its spec."""
        spec, modules = self.spec, self._modules  # where __getattr__ would look, at a microsecond each
        k_proj = modules.get("k_proj") or partial(self._project, "k_proj")
        v_proj = modules.get("v_proj") or partial(self._project, "v_proj")
        return Layer(
            Parts(self.q_proj, k_proj, v_proj, self.o_proj, modules.get("q_norm"), modules.get("k_norm")),
            Numbers(self.scaling, None, spec.softcap, None, None, self.rule, self.lyra),
            shape_of(spec),
        )

    def call(self, position_embeddings: tuple[torch.Tensor, torch.Tensor], cache: ModelCache | None) -> Call:
        """A call at the positions of Hugging Face's tables of cosines and sines [B,T,D], whose halves are equal."""
        half = self.head_dim // 2
        cos, sin = position_embeddings
        turn = cos.narrow(-1, 0, half), sin.narrow(-1, 0, half)
        return Call(None, None, self.static, cache, self.blend, turn)

    def extra_repr(self) -> str:
        """The Lyra heads and the size of the context, for print(model)."""
        slots = 0 if self.static_k is None else self.static_k.shape[2]
        return f"lyra_q_heads={list(self.spec.lyra_q_heads)}, context of {slots} tokens"

    @property
    def static(self) -> StaticKV | None:
        """The prepared context, or None."""
        if not self.static_rows:
            return None
        k, v, positions = self.static_k, self.static_v, self.static_positions
        assert k is not None
        assert v is not None
        assert positions is not None
        if self.static_trainable and (turn := self._turn(positions)) is not None:
            k = rotate(k, *(part[:, None] for part in turn))
        return StaticKV(k, v, self.static_visible, positions, self.static_group)

    @property
    def lyra_kv_cache(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The static keys, rotated to where live tokens meet them, and values, [Bc,Hs,S,D] each, or None."""
        static = self.static
        return None if static is None else static[:2]

    @property
    def lyra_position_embeddings(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin [Bc,S,D], float32, by which the static keys are rotated, or None."""
        turn = None if self.static_positions is None else self._turn(self.static_positions)
        if turn is None:
            return None
        cos, sin = (torch.cat((half, half), dim=-1) for half in turn)
        return cos, sin

    def _attend_plainly(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor | None,
        cache: Cache | None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What Hugging Face's module does, by its own rotary embedding and its attention interface. Clause IDENTITY."""
        layer, trace = self.layer, self.trace
        q, k, v = project(x, layer)
        if trace is not None:
            note(trace, "project", q, k, v)
        q, k = norm(q, k, layer)
        if trace is not None:
            note(trace, "norm", q, k)
        assert k is not None
        assert v is not None
        q, k = type(self).rotary(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        if trace is not None:
            note(trace, "rope", q.transpose(1, 2), k.transpose(1, 2))
        k, v = (k, v.transpose(1, 2)) if cache is None else cache.update(k, v.transpose(1, 2), self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, type(self).eager)
        dropout = self.attention_dropout if self.training else 0.0
        heads, weights = attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        heads = heads.reshape(*x.shape[:2], -1, self.head_dim)
        result = output(heads, layer)
        if trace is not None:
            note(trace, "attend", heads)
            note(trace, "output", result)
        return result, weights

    def _weights(self, q: torch.Tensor, live: Keys, layer: Layer, call: Call) -> torch.Tensor:
        """What the heads look at, for rotated q [B,T,Hq,D]: float32 [B,Hq,T,S+L]."""
        if self.static_group is not None:
            raise InputError(
                f"layer {self.layer_idx}: the context's slots are spread over processes, none of which sees what a "
                f"head looks at; enable it without a group for that"
            )
        found = attentions(q, live, layer, call)
        return found if self.shown is None else show_slots(found, self.shown)

    def _turn(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        frequencies = inverse_frequencies(self.spec)
        return None if frequencies is None else cos_sin(positions, frequencies.to(positions.device))

    def _is_plain(self, mask: torch.Tensor | None, tokens: int, cache: Cache | None) -> bool:
        """Whether Hugging Face's own attention does: no context, and causal (clause IDENTITY).

        Without a mask it takes several queries behind other keys for the first ones.
        """
        sees = self.spec.static.sees
        if self.static_rows or not (sees.earlier and sees.own):
            return False
        if mask is not None or tokens == 1 or cache is None:
            return True
        keys, _ = cache.get_mask_sizes(tokens, self.layer_idx)
        return tokens == keys

    def _check_batch(self, batch: int) -> None:
        if self.static_rows and batch % self.static_rows:
            raise InputError(
                f"layer {self.layer_idx}: the context holds {self.static_rows} rows and the call {batch}; "
                f"attach a context of one row (shared by all), of {batch}, or of one row a prompt where each prompt "
                f"stands in several rows side by side (beams)"
            )
