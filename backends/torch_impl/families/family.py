"""What the backend has to know of Hugging Face's classes of one family of models, and asks nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lyra.backends.checkpoint import Checkpoint
from lyra.spec.attention import RopeSpec


class Source(NamedTuple):
    """A submodule of an attention whose output holds keys or values, and how [B,Hkv,T,D] is made of it."""

    module: nn.Module
    by_head: Callable[[torch.Tensor], torch.Tensor]


class Family(NamedTuple):
    """Hugging Face's classes of a family, and how its decoder layers are put together.

    name            that of the family in `lyra.spec.families`
    causal_model    the class with a language head; holders names classes, in words, that a user may have instead
    text_model      the class of the decoder within them
    config          the config of a checked folder, every layer's kind and RoPE written out
    key_mapping     where a multimodal checkpoint keeps the parts of the text model, as from_pretrained takes it
    attention       Hugging Face's attention class with Lyra heads
    decoder_layer   the class of a layer
    injected_layer  its subclass, with a block between its halves
    keys_and_values of an attention: what gives its keys, normed and unrotated, and its values
    turn            cos, sin [B,S,D] of positions [B,S] in a layer of a decoder, in the type of the tensor given
    frequencies     the buffer by whose values the global layers of a decoder turn; None where there is none
    """

    name: str
    causal_model: Any
    holders: str
    text_model: Any
    config: Callable[[Checkpoint], Any]
    key_mapping: Mapping[str, str]
    attention: Any
    decoder_layer: Any
    injected_layer: Any
    keys_and_values: Callable[[Any], tuple[Source, Source]]
    turn: Callable[[Any, torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
    frequencies: Callable[[Any], torch.Tensor | None]


def rope_table(rope: RopeSpec) -> dict[str, Any]:
    """One kind of layer's entry in a config's `rope_parameters`."""
    if rope.factor == 1:
        return {"rope_type": "default", "rope_theta": rope.theta}
    return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}
