"""Devices by their names."""

from __future__ import annotations

import jax

from lyra.spec.arguments import no_device


def device_named(name: str | None) -> jax.Device | None:
    """A device that is here: "cpu", "gpu" or "cuda", "cpu:1" and so on; None is JAX's default. Raises InputError."""
    if name is None:
        return None
    platform, _, index = name.partition(":") if isinstance(name, str) else ("", "", "")
    try:
        found = jax.devices({"cuda": "gpu"}.get(platform, platform)) if platform else []
    except RuntimeError:
        found = []
    chosen = [device for number, device in enumerate(found) if str(number) == (index or "0")]
    if not chosen:
        raise no_device(name, "JAX", devices())
    return chosen[0]


def devices() -> list[str]:
    """The names of the devices that are here."""
    return list(dict.fromkeys(f"{device.platform}:{device.id}" for device in (*jax.devices(), *jax.devices("cpu"))))
