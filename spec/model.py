"""ModelSpec: a whole text model as the spec sees it, its family, its layer pattern and the spec of every layer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from importlib.resources import files
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from . import families
from .arguments import is_whole, shown
from .attention import AttentionSpec, Positive, Size, StaticSpec
from .base import SpecModel
from .errors import SpecError
from .hf_config import spec_fields
from .split import HeadSplit
from .text_file import read_toml

LayerType = Literal["sliding", "global"]


class LayerSplit(SpecModel):
    """The head split of one layer, where layers differ."""

    layer: Annotated[int, Field(ge=0)]
    split: HeadSplit


class ModelSpec(SpecModel):
    """A decoder of sliding-window and global layers.

    `attention` describes the global layers, `sliding` the sliding-window ones (None where there are none).
    `splits` overrides the head split of single global layers. `layer(i)` gives the AttentionSpec of layer i.
    `family` says how weights are called and what a layer is made of beside its attention (`lyra.spec.families`); it is
    None, "none" in a file, for a model that is described and that Lyra does not run.

    Raises SpecError.
    """

    name: str
    vocab_size: Size
    intermediate_size: Size
    pattern: tuple[LayerType, ...]
    attention: AttentionSpec
    sliding: AttentionSpec | None = None
    rms_norm_eps: Positive = 1e-6
    hidden_activation: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    final_softcap: Positive | None = None
    splits: tuple[LayerSplit, ...] = ()
    family: str | None = families.DEFAULT

    @field_validator("sliding", "final_softcap", "family", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("family")
    @classmethod
    def _known_family(cls, name: str | None) -> str | None:
        if name is not None and name not in families.FAMILIES:
            raise ValueError(
                f"{shown(name)} is no family; known: {', '.join(families.FAMILIES)}, or 'none' for a model that is "
                f"only described"
            )
        return name

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if not self.pattern:
            raise ValueError("pattern is empty; a model has at least one layer")
        if "sliding" in self.pattern and self.sliding is None:
            raise ValueError("the pattern has sliding layers; give their spec as `sliding`")
        if self.attention.sliding_window is not None:
            raise ValueError("`attention` describes global layers; leave sliding_window to `sliding`")
        wrong = [item.layer for item in self.splits if item.layer not in self.global_layers]
        if wrong:
            raise ValueError(
                f"splits name layers {wrong}, which are not global; the global layers are {list(self.global_layers)}"
            )
        bound = tuple(item.replace(split=item.split.bind(self.attention)) for item in self.splits)
        object.__setattr__(self, "splits", bound)
        return self

    @property
    def hidden_size(self) -> int:
        """E, the width of the residual stream."""
        return self.attention.hidden_size

    @property
    def num_attention_heads(self) -> int:
        """Hq of the global layers."""
        return self.attention.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Hkv of the global layers."""
        return self.attention.num_key_value_heads

    @property
    def num_hidden_layers(self) -> int:
        """The number of decoder layers."""
        return len(self.pattern)

    @cached_property
    def global_layers(self) -> tuple[int, ...]:
        """Indices of the global layers: the only ones that can carry Lyra heads (clause SLIDING)."""
        return tuple(i for i, kind in enumerate(self.pattern) if kind == "global")

    def layer(self, index: int) -> AttentionSpec:
        """The spec of layer `index`, with that layer's split."""
        if not is_whole(index) or not 0 <= index < len(self.pattern):
            raise SpecError(
                f"{self.name}: there is no layer {shown(index)}; it has layers 0 to {len(self.pattern) - 1}"
            )
        if self.pattern[index] == "sliding":
            assert self.sliding is not None
            return self.sliding
        own = {item.layer: item.split for item in self.splits}
        return self.attention.replace(split=own[index]) if index in own else self.attention

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, in Hugging Face's names and layout; the head's where it is not tied.

        Raises SpecError for a model of no family.
        """
        return families.of(self).weight_shapes(self)

    def with_split(self, split: HeadSplit | Mapping[int, HeadSplit] | None, static: StaticSpec | None = None) -> Self:
        """The same model with one split for all global layers, or one per layer (layers left out get none)."""
        static = static or self.attention.static
        if isinstance(split, Mapping):
            splits = tuple(LayerSplit(layer=layer, split=heads) for layer, heads in sorted(split.items()))
            return self.replace(attention=self.attention.replace(split=None, static=static), splits=splits)
        return self.replace(attention=self.attention.replace(split=split, static=static), splits=())

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any], name: str | None = None) -> Self:
        """The spec of a config.json of a known family, old or new style, text-only or multimodal.

        What the file leaves out means what transformers fills in, RoPE included. Raises SpecError for a model of
        another family, for what transformers itself refuses, and for a feature the spec does not have.
        """
        return cls(**spec_fields(config, name))

    @classmethod
    def preset(cls, name: str) -> Self:
        """A model the package knows by name. Raises SpecError with the known names."""
        if name not in presets():
            raise SpecError(f"unknown preset {name!r}; known: {', '.join(presets())}")
        return cls.from_toml((files("lyra.spec") / "presets" / f"{name}.toml").read_text(encoding="utf-8"))


def presets() -> tuple[str, ...]:
    """Names of the models the package describes."""
    found = (files("lyra.spec") / "presets").iterdir()
    return tuple(sorted(item.name.removesuffix(".toml") for item in found if item.name.endswith(".toml")))


def load_spec(source: str | os.PathLike[str]) -> ModelSpec | AttentionSpec:
    """A preset's name or a TOML file; the file describes a model or a single attention layer. Raises SpecError."""
    if not isinstance(source, str | os.PathLike):
        raise SpecError(f"a spec is named by a text or a path, not by {source!r:.200}")
    text = os.fspath(source)
    if text in presets():
        return ModelSpec.preset(text)
    if not text.endswith(".toml") or not os.path.isfile(text):
        raise SpecError(f"{text!r} is neither a .toml file nor a preset; presets: {', '.join(presets())}")
    fields = read_toml(text, what="the fields of a model or of an attention layer")
    return ModelSpec.from_dict(fields) if "pattern" in fields else AttentionSpec.from_dict(fields)
