"""Hugging Face's classes by family of models: the module of a family's name holds them, as `FAMILY`.

The rest of the backend knows transformers, its caches, masks and configs, but no model of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from lyra.spec import families
from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec

from .family import Family, Source

__all__ = ["Family", "Source", "family", "of", "of_layer", "of_text", "text_model"]


def family(name: str) -> Family:
    """The family of a name of `lyra.spec.families`. Raises InputError where this backend does not run it."""
    try:
        found: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise InputError(f"the PyTorch backend does not run models of the family {name!r}") from None
    return found


def of(spec: ModelSpec) -> Family:
    """The family of a model. Raises SpecError for one of none, InputError for one that this backend does not run."""
    return family(families.of(spec).name)


def of_text(text: PreTrainedModel) -> Family:
    """The family of a decoder that `text_model` gave."""
    return next(known for known in _families() if isinstance(text, known.text_model))


def of_layer(layer: nn.Module) -> Family:
    """The family of a decoder layer, with or without a block in it. Raises InputError for another module."""
    for known in _families():
        if isinstance(layer, known.decoder_layer):
            return known
    names = " or ".join(known.decoder_layer.__name__ for known in _families())
    parts = sorted(name for name, _ in layer.named_children())
    raise InputError(
        f"the layer is of the class {type(layer).__name__} with the parts {parts}; a block goes into a plain {names}"
    )


def text_model(model: nn.Module) -> PreTrainedModel:
    """The decoder in a model of a known family. Raises InputError where there is none, or more than one."""
    classes = tuple(known.text_model for known in _families())
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, classes)]
    if len(found) != 1:
        names = " or ".join(f"{kind.__name__}s" for kind in classes)
        holders = " or ".join(known.holders for known in _families())
        raise InputError(
            f"a {type(model).__name__} holds {len(found)} {names}; expected a {families.titles()}, such as {holders}"
        )
    return found[0]


def _families() -> Iterator[Family]:
    """Those that this backend runs."""
    for name in families.FAMILIES:
        try:
            yield family(name)
        except InputError:
            continue
