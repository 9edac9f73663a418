"""The half of the attention module that has the weights: shared with the original's, key and value heads by stream.

PyTorch alone: in JAX weights are arrays that many functions read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import InputError

from . import projections
from .head_buffers import HeadBuffers
from .offload import device_of

OF_THE_MODULE = (
    "scaling", "attention_dropout", "is_causal",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
"""What the original module has now, whatever its config says, and its hooks, which belong to the place in the model:
transformers collects `output_attentions` by some that it registers once."""

TUNED = ("static_k", "static_v")
"""The parameters of a context that is tuned. They belong into its file, not into the model's."""


class SplitProjections(HeadBuffers):
    """A module with the submodules of Hugging Face's attention, whose key and value projections stand in two parts.

    Each stream's can then be tuned alone: `lyra_k_proj` and `lyra_v_proj` are for the KV heads that Lyra heads read,
    shared ones too, `vanilla_k_proj` and `vanilla_v_proj` for the rest. A projection that is more than a linear layer
    (wrapped for LoRA, quantised, offloaded, split over devices) stays whole, as `k_proj` and `v_proj`. State dicts are
    those of the original, with `k_proj` and `v_proj`, either way.
    """

    original: ClassVar[type[nn.Module]]
    """Hugging Face's class."""
    shared: ClassVar[tuple[str, ...]]
    """The submodules that both streams and the original module share; the last one is never wrapped."""

    config: Any
    q_proj: Any
    o_proj: Any
    layer_idx: int
    spec: AttentionSpec
    head_dim: int
    kv_order: torch.Tensor | None
    static_trainable = False
    _original: tuple[Any, ...] = ()  # in a tuple, so that it is no submodule

    def __init__(self, config: Any, layer_idx: int, spec: AttentionSpec) -> None:
        """A new module of Hugging Face's class for a layer of `spec`, which may be this process's heads only."""
        super().__init__(config, layer_idx)
        self.spec = spec
        self._cut(self.k_proj, self.v_proj)
        self.register_state_dict_post_hook(_join_state)
        self.register_load_state_dict_pre_hook(_cut_state)

    def load_weights_from_original(self, original: Any) -> None:
        """Take over the weights of `original`, such as `layer.self_attn`, bit for bit.

        They are shared, not copied: q_proj, o_proj and the norms are its modules, the parts of k_proj and v_proj
        views of its rows where a stream's heads stand side by side, copies otherwise.
        """
        if isinstance(original, SplitProjections):
            raise InputError(f"load_weights_from_original: this is a {type(self).__name__}; give its to_original()")
        for name in (*self.shared, *OF_THE_MODULE):
            setattr(self, name, getattr(original, name))
        self._cut(original.k_proj, original.v_proj)
        self._original = (original,)
        self.train(original.training)

    def to_original(self) -> Any:
        """A module of the original class with the weights that this module has now, bit for bit, and no context.

        It is the module that the weights were loaded from, if any, brought up to date: with this module's submodules,
        where q_proj, say, has been wrapped for LoRA since, and in k_proj and v_proj with the rows of their parts, where
        these have been tuned or moved. Otherwise it is a new one. Raises InputError where a part has been wrapped
        itself: merge the adapter first.
        """
        original = self._original[0] if self._original else self._new_original()
        if not self.whole:
            for name in projections.NAMES:
                projections.restore(getattr(original, name), self._parts(name), self.kv_order, self.head_dim)
        for name in (*self.shared, *projections.NAMES) if self.whole else self.shared:
            setattr(original, name, getattr(self, name))
        original.train(self.training)
        return original

    @property
    def whole(self) -> bool:
        """Whether k_proj and v_proj stand whole, being more than linear layers."""
        return "k_proj" in self._modules

    def weights(self, name: str) -> torch.Tensor:
        """A weight by its name in the original, such as "k_proj.weight"; of a wrapped projection the wrapped one."""
        module, _, kind = name.partition(".")
        if self.whole or module not in projections.NAMES:
            return getattr(getattr(self, module), kind)
        vanilla, lyra = (getattr(part, kind) for part in self._parts(module))
        return projections.join(vanilla, lyra, self.kv_order, self.head_dim, dim=0)

    def _project(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [B,T,E] through "k_proj" or "v_proj", [B,T,Hkv·D], heads in their original order."""
        if self.whole:
            return getattr(self, name)(x)
        # One of them may have no head, as where there is one KV head in all; a gradient, if an empty one, it must have.
        if len(self._streams) == 1 and not torch.is_grad_enabled():
            return getattr(self, f"{self._streams[0]}_{name}")(x)
        vanilla, lyra = self._parts(name)
        return projections.join(vanilla(x), lyra(x), self.kv_order, self.head_dim, dim=2)

    def _parts(self, name: str) -> tuple[nn.Module, nn.Module]:
        """The vanilla and the Lyra part of "k_proj" or "v_proj"."""
        return getattr(self, f"vanilla_{name}"), getattr(self, f"lyra_{name}")

    def _cut(self, k_proj: Any, v_proj: Any) -> None:
        heads = projections.streams(self.spec)
        self._streams = tuple(stream for stream, chosen in zip(heads._fields, heads, strict=True) if chosen)
        for name in projections.NAMES:
            for old in (name, f"vanilla_{name}", f"lyra_{name}"):
                self._modules.pop(old, None)
        if projections.is_plain(k_proj) and projections.is_plain(v_proj):
            for name, module in zip(projections.NAMES, (k_proj, v_proj), strict=True):
                for stream, chosen in zip(heads._fields, heads, strict=True):
                    setattr(self, f"{stream}_{name}", projections.cut(module, chosen, self.head_dim))
        else:
            self.k_proj, self.v_proj = k_proj, v_proj
        device = device_of(self.anchor)
        self.register_buffer("kv_order", None if heads.order is None else heads.order.to(device), persistent=False)
        self.place_heads(self.spec, device)

    def _new_original(self) -> nn.Module:
        with torch.device("meta"):
            made = self.original(self.config, self.layer_idx)
        for name in projections.NAMES:
            getattr(made, name).to_empty(device=self.anchor.get_parameter("weight").device)
        return made

    @property
    def anchor(self) -> nn.Module:
        """A submodule that has the device and the type of what the layer computes, and is never wrapped."""
        return getattr(self, self.shared[-1])


def _join_state(module: SplitProjections, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    for name in TUNED:
        state.pop(prefix + name, None)
    if not module.whole:
        projections.joined_state(state, prefix, module.kv_order, module.head_dim)


def _cut_state(module: SplitProjections, state: dict[str, Any], prefix: str, *_: object) -> None:
    if module.static_trainable:
        state |= {prefix + name: getattr(module, name).detach() for name in TUNED}
    if not module.whole:
        projections.cut_state(state, prefix, projections.streams(module.spec), module.head_dim)
