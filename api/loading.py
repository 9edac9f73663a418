"""load: from the name of a model and of a backend to a Model."""

from __future__ import annotations

import os
from typing import Any

from lyra.backends.protocol import Backend, BackendNotFound, ModelBackend, check_backend, get_backend
from lyra.spec.arguments import check_path, shown
from lyra.spec.attaching import SplitSource
from lyra.spec.context import StaticContext

from .checkpoint import resolve
from .errors import ModelError
from .model import MODES, Mode, Model
from .text import Text


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    backend: str | Backend = "torch",
    split: SplitSource | None = None,
    context: StaticContext | str | os.PathLike[str] | None = None,
    mode: Mode = "parallel",
    dtype: str = "float32",
    device: str | None = None,
    mesh: Any | None = None,
) -> Model:
    """A model, ready to use.

    model    a local folder in Hugging Face's layout, a .gguf file, "gemma-3-270m" (the extra gemma-270m), a hub id;
             None means the environment variable LYRA_MODEL, else the extra
    backend  "torch", "jax", the name of another installed backend, "package.module:Class", or a backend itself
    split    the head split, one for all layers or one by layer, that contexts are attached with; or the TOML file or
             preset of a model that has one
    context  a StaticContext, or its file, to attach at once
    mode     "parallel": heads of the model's own attention read a context; "sequential": attention blocks behind it do
    dtype    "float32", or another one that the backend computes in, such as "bfloat16"
    device   the backend's name of a device; None is its default
    mesh     for backend "jax": a jax.sharding.Mesh whose axes "heads" and "context" the model and its contexts are
             spread over

    Raises CheckpointError where there is no such model, BackendNotFound or ImportError for the backend, ModelError for
    a mode that it does not have, InputError for an argument of another type, a dtype or a device that the backend does
    not know, and what `Model.attach` raises.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise ModelError(f"unknown mode {shown(mode)}; known: {', '.join(MODES)}")
    if model is not None:
        check_path("model", model, "the path of a folder or .gguf file, or the name of a model")
    if context is not None and not isinstance(context, StaticContext):
        check_path("context", context, "a StaticContext or the path of its file")
    maker = get_backend(backend) if isinstance(backend, str) else check_backend(backend)
    if not isinstance(maker, ModelBackend):
        raise BackendNotFound(f"backend {maker.name!r} has attention layers only, no whole models: it lacks load()")
    if mesh is not None and "mesh" not in maker.capabilities:
        raise ModelError(f"backend {maker.name!r} takes no mesh; load with backend='jax', or without mesh")
    if mode == "sequential" and "inject" not in maker.capabilities:
        raise ModelError(
            f"backend {maker.name!r} has no whole models with injected blocks (capability 'inject'); "
            f"take backend='torch' or 'jax', or mode='parallel'"
        )
    folder = resolve(model)
    options: dict[str, Any] = {} if mesh is None else {"mesh": mesh}
    text = Text.from_folder(folder)  # before the weights: a folder that is refused costs nothing
    made = Model(maker.load(str(folder), dtype=dtype, device=device, **options), text, split=split, mode=mode)
    if context is not None:
        made.attach(context)
    return made
