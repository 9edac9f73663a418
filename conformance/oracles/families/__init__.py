"""Hugging Face's classes as oracles, by family of models: the module of a family's name holds them, as `FAMILY`.

The oracles know transformers, its masks and its interface of attention functions, but no model of it.
"""

from __future__ import annotations

import importlib
from functools import cache

from lyra.spec import families
from lyra.spec.attention import AttentionSpec
from lyra.spec.errors import SpecError
from lyra.spec.model import ModelSpec

from .family import Family

__all__ = ["Family", "expressing", "families_known", "family", "of", "supports"]


@cache
def family(name: str) -> Family:
    """The oracle's family of a name of `lyra.spec.families`."""
    found: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
    return found


def families_known() -> tuple[Family, ...]:
    """All of them, as the spec lists them."""
    return tuple(family(name) for name in families.FAMILIES)


def of(spec: ModelSpec) -> Family:
    """The family of a whole model."""
    return family(families.of(spec).name)


def supports(spec: AttentionSpec) -> str | None:
    """Why no class of Hugging Face's here expresses a layer, or None if one does."""
    reasons = [known.supports(spec) for known in families_known()]
    return None if None in reasons else "; ".join(reason for reason in reasons if reason is not None)


def expressing(spec: AttentionSpec) -> Family:
    """The first family whose attention a layer is. Raises SpecError with the reasons where there is none."""
    for known in families_known():
        if known.supports(spec) is None:
            return known
    raise SpecError(f"the Hugging Face oracle cannot express this spec: {supports(spec)}")
