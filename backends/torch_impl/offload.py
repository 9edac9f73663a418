"""Weights that accelerate keeps elsewhere between calls (`device_map` with "cpu" or "disk") and brings in for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: on the device of its weight, or where accelerate brings that for a call."""
    where = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return module.get_parameter("weight").device if where is None else torch.device(where)


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Have the weights of a module and its submodules in place while the block runs."""
    hooks: dict[nn.Module, Any] = {part: getattr(part, "_hf_hook", None) for part in module.modules()}
    away = {part: hook for part, hook in hooks.items() if getattr(hook, "offload", False)}
    for part, hook in away.items():
        hook.pre_forward(part)
    try:
        yield
    finally:
        for part, hook in away.items():
            hook.post_forward(part, None)
