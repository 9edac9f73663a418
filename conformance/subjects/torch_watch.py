"""Hooks that read the stages of a layer's attention, or of its injected block, while its model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

Stages = dict[str, torch.Tensor]
Undo = Callable[[], None]


def watch_attention(module: Any, cache: Cache | None, stages: Stages) -> list[Undo]:
    """Read an attention module's stages into `stages`; what is returned takes the hooks out again."""
    undo = [*_watch_norms(module, stages, heads_first=True), *_watch_output(module.o_proj, module.head_dim, stages)]
    undo.append(_after(module, "_rotated", lambda made: stages.update(q_rope=made[0].transpose(1, 2))))
    if cache is not None:

        def taken(update: Any) -> Any:
            def watched(key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
                if layer == module.layer_idx:
                    stages.update(k_rope=key.transpose(1, 2), v_proj=value.transpose(1, 2))
                return update(key, value, layer, *args, **kwargs)

            return watched

        undo.append(_instead(cache, "update", taken))
    return undo


def watch_block(block: Any, stages: Stages) -> list[Undo]:
    """The same of an injected block, whose submodules may be those of its layer: to be called when it begins."""
    parts, attention = block.parts, block.spec.attention
    undo = [*_watch_norms(parts, stages, heads_first=False), *_watch_output(parts.o_proj, attention.head_dim, stages)]
    undo.append(_made(parts.input_norm, lambda made: stages.update(input_norm=made)))
    undo.append(_made(parts.o_proj, lambda made: stages.update(attention=made)))
    undo.append(_made(parts.v_proj, lambda made: stages.update(v_proj=made.unflatten(-1, (-1, attention.head_dim)))))
    if parts.output_norm is not None:
        undo.append(_made(parts.output_norm, lambda made: stages.update(output_norm=made)))
    rotated = iter(("q_rope", "k_rope"))
    undo.append(_after(block, "_rotated", lambda made: stages.update({next(rotated): made})))
    return undo


def _watch_norms(parts: Any, stages: Stages, heads_first: bool) -> list[Undo]:
    def told(name: str) -> Callable[[torch.Tensor], None]:
        return lambda value: stages.update({name: value.transpose(1, 2) if heads_first else value})

    undo = []
    for kind in ("q", "k"):
        norm = getattr(parts, f"{kind}_norm")
        undo += [_given(norm, told(f"{kind}_proj")), _made(norm, told(f"{kind}_norm"))]
    return undo


def _watch_output(o_proj: nn.Module, head_dim: int, stages: Stages) -> list[Undo]:
    return [_given(o_proj, lambda flat: stages.update(heads=flat.unflatten(-1, (-1, head_dim))))]


def _given(module: nn.Module, told: Callable[[torch.Tensor], None]) -> Undo:
    return module.register_forward_pre_hook(lambda _, args: told(args[0])).remove


def _made(module: nn.Module, told: Callable[[torch.Tensor], None]) -> Undo:
    return module.register_forward_hook(lambda _, args, made: told(made)).remove


def _after(owner: Any, name: str, told: Callable[[Any], None]) -> Undo:
    def around(method: Any) -> Any:
        def watched(*args: Any) -> Any:
            told(made := method(*args))
            return made

        return watched

    return _instead(owner, name, around)


def _instead(owner: Any, name: str, around: Callable[[Any], Any]) -> Undo:
    """Put a function around a method of one object."""
    setattr(owner, name, around(getattr(owner, name)))
    return lambda: delattr(owner, name)
