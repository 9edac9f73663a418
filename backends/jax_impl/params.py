"""From a folder in Hugging Face's layout to a model: a table of names, and no name left over on either side."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import safe_open

from lyra.spec.errors import InputError
from lyra.spec.model import ModelSpec

from .dtype import enter
from .gemma3 import Gemma3
from .sharding import ShardingConfig

DECODER = r"(?:model\.language_model|language_model\.model|model)\."
NAMES: tuple[tuple[str, str], ...] = (
    (DECODER + r"embed_tokens\.weight", r"embed_tokens.weight"),
    (DECODER + r"layers\.(\d+)\.self_attn\.([qkvo]_proj)\.(weight|bias)", r"layers.\1.self_attn.\2.\3"),
    (DECODER + r"layers\.(\d+)\.self_attn\.([qk]_norm)\.weight", r"layers.\1.self_attn.\2.weight"),
    (DECODER + r"layers\.(\d+)\.mlp\.((?:gate|up|down)_proj)\.weight", r"layers.\1.mlp.\2.weight"),
    (DECODER + r"layers\.(\d+)\.(input|post_attention)_layernorm\.weight", r"layers.\1.\2_layernorm.weight"),
    (
        DECODER + r"layers\.(\d+)\.(pre|post)_feedforward_layernorm\.weight",
        r"layers.\1.\2_feedforward_layernorm.weight",
    ),
    (DECODER + r"norm\.weight", r"norm.weight"),
    (r"(?:language_model\.)?lm_head\.weight", r"lm_head.weight"),
)
"""Hugging Face's names (of the text model, alone or in a multimodal one, old style or new) and the module's paths."""

UNREAD = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\..*")
"""Parts of a multimodal checkpoint that a text model does not have."""


def load_model(
    folder: Path, dtype: np.dtype[Any], device: jax.Device | None = None, mesh: Mesh | None = None
) -> Gemma3:
    """The model of a folder with config.json and *.safetensors, in `dtype`, on `device` (JAX's default) or `mesh`.

    Raises SpecError for another architecture, and InputError for tensors that are missing, unknown, given twice or of
    another shape.
    """
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    spec = ModelSpec.from_hf_config(fields)
    sharding = ShardingConfig.no_sharding() if mesh is None else ShardingConfig.over(mesh, spec)
    graph, state = nnx.split(nnx.eval_shape(lambda: Gemma3(spec, sharding, rngs=nnx.Rngs(0))))
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    found: dict[str, str] = {}
    for name, tensor in read_tensors(folder):
        target = module_path(name)
        if target is None or (target == "lm_head.weight" and spec.tie_word_embeddings):
            continue
        if target not in flat:
            raise InputError(f"{folder}: tensor {name!r} has no place in this model ({spec.num_hidden_layers} layers)")
        if target in found:
            raise InputError(f"{folder}: tensors {found[target]!r} and {name!r} are both the model's {target!r}")
        path, leaf = flat[target]
        if tensor.shape != leaf.shape:
            raise InputError(f"{folder}: tensor {name!r} has shape {tensor.shape}; the config says {leaf.shape}")
        found[target] = name
        place = sharding.parameter(target, leaf.shape) or device
        flat[target] = (path, leaf.replace(jax.device_put(enter(tensor, dtype), place)))
    missing = sorted(set(flat) - set(found))
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing, among them {', '.join(missing[:3])}")
    return nnx.merge(graph, nnx.from_flat_state(list(flat.values())))


def module_path(name: str) -> str | None:
    """Where a checkpoint's tensor belongs in the module; None for parts that are not read.

    Raises InputError for a name that the table does not have, or has twice.
    """
    if UNREAD.fullmatch(name):
        return None
    targets = [match.expand(target) for pattern, target in NAMES if (match := re.fullmatch(pattern, name))]
    if len(targets) != 1:
        what = "no entry in the table of names" if not targets else f"several: {targets}"
        raise InputError(f"tensor {name!r} has {what}; a Gemma-3 checkpoint was expected")
    return targets[0]


def read_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name and NumPy array of every tensor, file by file. Raises InputError where files are missing."""
    for path in _files(folder):
        if not path.is_file():
            raise InputError(f"{folder}: {path.name} is missing; it is named in model.safetensors.index.json")
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open file is no mapping)
                yield name, file.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / shard for shard in sorted(set(shards))]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no *.safetensors; save the model with safe_serialization=True")
    return files
