"""Devices by their names."""

from __future__ import annotations

import torch

from lyra.spec.arguments import no_device


def device_named(name: str | torch.device | None) -> torch.device:
    """A device that is here: "cpu", which None means, "cuda", "cuda:1", "mps" and so on. Raises InputError."""
    if name is None:
        return torch.device("cpu")
    known = devices()
    try:
        found = torch.device(name) if isinstance(name, str | torch.device) else None
    except RuntimeError:
        found = None
    if found is None or str(found) not in {*known, *(device.partition(":")[0] for device in known)}:
        raise no_device(name, "PyTorch", known)
    return found


def devices() -> list[str]:
    """The names of the devices that are here."""
    kind = torch.accelerator.current_accelerator()
    others = [] if kind is None else [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]
    return ["cpu", *others]
