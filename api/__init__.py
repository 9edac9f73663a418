"""Lyra: attention heads that read a static, pre-loaded context, specified once and run by several frameworks.

    import lyra
    model = lyra.load("gemma-3-270m", backend="jax")
    context = model.capture("a long text")
    model.attach(context)
    model.generate("a prompt")

Nothing heavy is imported before it is used: no framework, until a model is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lyra.backends.protocol import BackendNotFound
    from lyra.choosing import choose_split
    from lyra.spec.attention import AttentionSpec, QKNormSpec, RopeSpec, StaticSpec
    from lyra.spec.context import StaticContext
    from lyra.spec.errors import (
        ContextError,
        InputError,
        NotFiniteError,
        SpecError,
        TextWarning,
        UncheckedContextWarning,
    )
    from lyra.spec.model import ModelSpec
    from lyra.spec.sequential import SequentialSpec
    from lyra.spec.split import HeadSplit

    from .drop_in import Lyra
    from .errors import CheckpointError, ModelError
    from .loading import load
    from .model import Model
    from .scoring import Score

__all__ = [
    "AttentionSpec",
    "BackendNotFound",
    "CheckpointError",
    "ContextError",
    "HeadSplit",
    "InputError",
    "Lyra",
    "Model",
    "ModelError",
    "ModelSpec",
    "NotFiniteError",
    "QKNormSpec",
    "RopeSpec",
    "Score",
    "SequentialSpec",
    "SpecError",
    "StaticContext",
    "StaticSpec",
    "TextWarning",
    "UncheckedContextWarning",
    "__version__",
    "choose_split",
    "load",
]

_HOMES = {
    "lyra.backends.protocol": ("BackendNotFound",),
    "lyra.choosing": ("choose_split",),
    "lyra.drop_in": ("Lyra",),
    "lyra.errors": ("CheckpointError", "ModelError"),
    "lyra.loading": ("load",),
    "lyra.model": ("Model",),
    "lyra.scoring": ("Score",),
    "lyra.spec.attention": ("AttentionSpec", "QKNormSpec", "RopeSpec", "StaticSpec"),
    "lyra.spec.context": ("StaticContext",),
    "lyra.spec.errors": (
        "ContextError",
        "InputError",
        "NotFiniteError",
        "SpecError",
        "TextWarning",
        "UncheckedContextWarning",
    ),
    "lyra.spec.model": ("ModelSpec",),
    "lyra.spec.sequential": ("SequentialSpec",),
    "lyra.spec.split": ("HeadSplit",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lyra")
    if name not in _HOME:
        raise AttributeError(f"module 'lyra' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
