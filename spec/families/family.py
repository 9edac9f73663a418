"""What belongs to one family of models, as data: whatever else reads a config, a file or a layer asks it here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import Field
from .gguf import GGUF

if TYPE_CHECKING:
    from ..model import ModelSpec

MODEL = "model."
"""Below it stands the decoder in the model's own names; a multimodal file may say otherwise."""


class LayerNorms(NamedTuple):
    """The norms around a decoder layer's attention and its feed-forward part, by name; None for one that is not there.

    x + attention_out(attention(attention_in(x))), and the same of the feed-forward part.
    """

    attention_in: str | None
    attention_out: str | None
    feed_forward_in: str | None
    feed_forward_out: str | None


class Names(NamedTuple):
    """Hugging Face's names of the weights that are not a layer's attention, nor its norms."""

    embedding: str = "model.embed_tokens.weight"
    layer: str = "model.layers.{}"
    attention: str = "self_attn"
    gate: str = "mlp.gate_proj.weight"
    up: str = "mlp.up_proj.weight"
    down: str = "mlp.down_proj.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"


NAMES = Names()


class Packaged(NamedTuple):
    """A model whose weights an installed package holds.

    name     what `load` calls it
    package  the module
    install  the command that installs it
    file     writes the .gguf file to a folder, or says where it lies, given the imported module
    digest   the SHA-256 of that file
    """

    name: str
    package: str
    install: str
    file: Callable[[ModuleType, Path], Path]
    digest: Callable[[ModuleType], str]


@dataclass(frozen=True, eq=False)
class Family:
    """One family of models: what its configs and files look like, and of what its decoder layers are made.

    name           what `ModelSpec.family` says
    title          what people call it
    text_type      `model_type` of the config of a text model
    outer_type     that of a multimodal config, with the text model's in its text_config; None where there is none
    architecture   transformers' class of the text model, as config.json names it
    fields         of a text config, with transformers' types and defaults; old_fields those of older files
    check_config   refuses a config that the spec cannot say, given its fields and what it holds
    read_config    the fields of the ModelSpec that a config's fields describe, without its name
    norms          of a decoder layer
    activation     of the feed-forward part, gated; `activation_field` is where a config names it
    embedding_scale  what embeddings are multiplied by, given hidden_size
    softcap        whether transformers' attention heeds a config's softcap of scores
    gguf           its .gguf files; None where none are read
    decoder_names  how files of any age begin the decoder's names, instead of MODEL; head_names how the head's
    other_parts    how names of what a multimodal file has beside the text model begin
    packaged       models that can be installed
    hub_id         an example of a hub id, given a preset's name
    """

    name: str
    title: str
    text_type: str
    architecture: str
    fields: Mapping[str, Field]
    check_config: Callable[[Mapping[str, Any], Mapping[str, Any]], None]
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    norms: LayerNorms
    activation: str
    old_fields: Mapping[str, Field] = field(default_factory=dict)
    outer_type: str | None = None
    activation_field: str = "hidden_act"
    embedding_scale: Callable[[int], float] = lambda _: 1.0
    softcap: bool = False
    gguf: GGUF | None = None
    names: Names = NAMES
    decoder_names: tuple[str, ...] = ()
    head_names: tuple[str, ...] = ()
    other_parts: tuple[str, ...] = ()
    packaged: tuple[Packaged, ...] = ()
    hub_id: str = "{}"

    @property
    def model_types(self) -> tuple[str, ...]:
        """Every `model_type` that a config.json of this family may begin with."""
        return (self.text_type,) if self.outer_type is None else (self.text_type, self.outer_type)

    @property
    def block_weights(self) -> dict[str, str]:
        """Where a decoder layer keeps the norms of a block injected behind its attention (SEQUENTIAL-7), by the
        block's names; the attention's weights stand below `names.attention`."""
        both = {"input_norm": self.norms.attention_in, "output_norm": self.norms.attention_out}
        return {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in both.items() if theirs is not None}

    def block_fields(self, spec: ModelSpec) -> dict[str, Any]:
        """What the spec of a block in a layer of this model must say of its norms: the layer's own serve it."""
        return {"norm_eps": spec.rms_norm_eps, "output_norm": self.norms.attention_out is not None}

    def weight_shapes(self, spec: ModelSpec) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of a model; the head's where it is not the embedding."""
        names, hidden = self.names, (spec.hidden_size,)
        wide, table = (spec.intermediate_size, spec.hidden_size), (spec.vocab_size, spec.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {names.embedding: table}
        for index in range(spec.num_hidden_layers):
            owner = names.layer.format(index)
            attention = spec.layer(index).weight_shapes()
            shapes |= {f"{owner}.{names.attention}.{name}": shape for name, shape in attention.items()}
            shapes |= {f"{owner}.{name}": wide for name in (names.gate, names.up)}
            shapes[f"{owner}.{names.down}"] = wide[::-1]
            shapes |= {f"{owner}.{name}.weight": hidden for name in self.norms if name is not None}
        shapes[names.norm] = hidden
        return shapes if spec.tie_word_embeddings else {**shapes, names.head: table}

    def text_name(self, name: str) -> str:
        """The model's own name of a tensor that a file calls `name`, if it is one of the text model's."""
        head = next((name.removeprefix(prefix) for prefix in self.head_names if name.startswith(prefix)), name)
        if head.startswith(self.names.head.removesuffix("weight")):
            return head
        prefix = next((prefix for prefix in (*self.decoder_names, MODEL) if name.startswith(prefix)), "")
        return MODEL + name.removeprefix(prefix)

    def is_other_part(self, name: str) -> bool:
        """Whether a tensor of a multimodal file belongs to what is not the text model."""
        return name.removeprefix(MODEL).startswith(self.other_parts)
