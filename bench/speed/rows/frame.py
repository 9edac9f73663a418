"""What a step costs where another thread pool has just worked in its process."""

from __future__ import annotations

from ..row import Contestant, Framework, Race, Rival

MAKE = "lyra.speed.contestants.mixed:lyra_beside"


def step(name: str, process: Framework, neighbour: str) -> Contestant:
    """A decode step of the PyTorch layer in a process, right after its neighbour there has worked."""
    return Contestant(name, process, MAKE, {"neighbour": neighbour, "static": 8192, "live": 256})


ROWS = (
    Race(
        "frame",
        "a decode step of Lyra in PyTorch, batch 1, in a process of its own and in one with JAX",
        step("alone", "torch", "nobody"),
        (
            Rival(step("right after a product in PyTorch", "torch", "torch")),
            Rival(step("in one process with JAX, right after a product there", "jax", "jax")),
        ),
        note="This is the frame measuring itself: above 1 a step is slower for what its process did just before. A "
        "product in JAX costs the next step about what one in PyTorch does, so the two hardly disturb each other when "
        "they take turns; all the same they have processes of their own, so that neither's threads can matter.",
    ),
)
