"""Rows of what contexts cost: bytes by preset, nats in fewer bits, memory while attached, time to load."""

from __future__ import annotations

from typing import Any

from ..row import BACKENDS, Contestant, Count, Race, Rival

MODULE = "lyra.speed.contestants.context"
SLOTS = 16384
"""1 GiB of keys and values of the 12B's eight global layers, four KV heads of each."""


def load(name: str, make: str = "load", **options: Any) -> Contestant:
    """A way to load that file."""
    return Contestant(name, "torch", f"{MODULE}_load:{make}", {"slots": SLOTS, **options})


ROWS = (
    Count(
        "context-bytes",
        "bytes of a context of S tokens that half of the heads of every global layer read, beside those of the same "
        "tokens in an ordinary cache",
        "torch",
        f"{MODULE}_bytes:preset_bytes",
        {"dtype": "bfloat16"},
        note="Hugging Face's cache keeps W − 1 tokens in layers with a window W; a full cache keeps all tokens in all "
        "layers. Where a model has one KV head (270M, 1B), half of its query heads read all of it. The 12B has a "
        "global layer in every six, so half of the KV heads make 1/12; 34 and 62 layers (4B, 27B) hold 5 and 10.",
    ),
    Count(
        "context-loss",
        "what a context of 512 tokens loses in fewer bits: mean NLL per token of six documents on the real 270M, the "
        "loss against float32 and the mean size of a token's change, in nats",
        "torch",
        f"{MODULE}_bytes:storage_loss",
        {"model": "gemma-3-270m"},
        note="int8 has one scale for each channel of the keys and one for each token of the values. The last kind has "
        "one for each token of the keys too, which their outlier channels then decide. Both backends read one file.",
    ),
    *(
        Count(
            f"context-memory-{backend}",
            "what a context of 8,192 tokens adds to a process's memory: 8 global layers of the 12B's shape, 4 KV heads "
            f"held, {name}",
            backend,
            f"{MODULE}_memory:attached",
            {"backend": backend, "slots": 8192, "cases": [("float32", 1), ("float32", 8), ("int8", 1)]},
            note="In shares of the bytes attended over, the float32 keys and values. The file is mapped: its pages are "
            "the system's and do not count. A context in fewer bits is widened layer by layer, so that one of eight "
            "layers comes to the peak of attaching.",
        )
        for backend, name in BACKENDS.items()
    ),
    Race(
        "context-load",
        "loading a context's file of 1 GiB, which is in the page cache, and holding it to its digests",
        load("load", verify=True),
        (
            Rival(load("load, verify=False", verify=False)),
            Rival(load("load, verify=False, and the hash by itself", "load_and_hash"), at_least=0.95),
        ),
        rounds=9,
        note="The hash reads every tensor once, at the speed of memory. Without it a load looks through the keys and "
        "values for NaN and infinity, and at the tables of cosines.",
    ),
)
