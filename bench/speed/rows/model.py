"""Rows of the whole 270M in PyTorch: first token, no context, and PEFT's prefixes at equal length."""

from __future__ import annotations

from typing import Any

from ..row import Contestant, Race, Rival

MODULE = "lyra.speed.contestants.model_torch"
STATIC, PROMPT = 4096, 16
PREFILL = 512
PREFIX = 512
"""Tokens of a prefix or context beside PEFT's."""


def contestant(name: str, make: str, **options: Any) -> Contestant:
    """A contestant of model_torch."""
    return Contestant(name, "torch", f"{MODULE}:{make}", options)


FIRST_TOKEN = Race(
    "first-token",
    f"time to the first token of a prompt of {PROMPT} tokens, 270M, a {STATIC:,}-token context loaded from its file",
    contestant("Lyra", "first_token_lyra", static=STATIC, tokens=PROMPT),
    (
        Rival(contestant("Hugging Face, prefill of all", "first_token_prefill", static=STATIC, tokens=PROMPT), 60.0),
        Rival(contestant("Hugging Face, copied cache", "first_token_copied", static=STATIC, tokens=PROMPT), 2.0),
        Rival(
            contestant(
                "Hugging Face, copied cache without windows",
                "first_token_copied",
                static=STATIC,
                tokens=PROMPT,
                sliding=False,
            )
        ),
    ),
    rounds=9,
    note="With a copied cache both contestants prefill the same prompt through the same modules, which is most of the "
    "time: matrix products of a few rows read all weights. What Lyra adds is opening and checking the file, comparing "
    "fingerprints, and turning the keys of the context; what it saves is the copy, which sliding windows keep small. "
    "So half the time is out of reach here, whatever attaching costs; a cache without windows takes longer to copy.",
)

NO_CONTEXT = (
    *(
        Race(
            f"no-context-{part}",
            f"no context, 270M: {what}; Lyra's attention in the global layers, and none of it",
            contestant("Lyra", "enabled", tokens=PREFILL, part=part),
            (Rival(contestant("Hugging Face", "plain", tokens=PREFILL, part=part), 1.0),),
            note="Without a context Lyra's module leaves its heads to Hugging Face's own attention: the two are alike. "
            "Two copies of Hugging Face's own model, timed against each other in random order, give 0.98 to 1.02 "
            "(quartiles of 60 decode steps), Lyra against it 0.98 to 1.01: the figure is within what this frame tells "
            "apart. A model of lyra.load without a context has Hugging Face's modules and none of Lyra's.",
        )
        for part, what in (("prefill", f"prefill of {PREFILL} tokens"), ("decode", f"decode step behind {PREFILL}"))
    ),
    Race(
        "no-context-generate",
        "no context, 270M: 24 tokens behind a prompt of 16, Lyra's generate and Hugging Face's",
        contestant("Lyra", "generate_lyra", tokens=PROMPT),
        (Rival(contestant("Hugging Face", "generate_plain", tokens=PROMPT), 1.0),),
        rounds=7,
    ),
)

PEFT = tuple(
    Race(
        f"peft-{part}-batch-{batch}",
        f"{PREFIX} tokens in front, 270M: {what}, batch {batch}",
        contestant("Lyra", "enabled", static=PREFIX, tokens=64, part=part, batch=batch),
        tuple(
            Rival(contestant(name, "peft", kind=kind, static=PREFIX, tokens=64, part=part, batch=batch), 1.0)
            for kind, name in (("prefix", "PEFT prefix tuning"), ("cartridge", "PEFT cartridge"))
        ),
        rounds=9,
    )
    for part, what in (("prefill", "prefill of 64 tokens"), ("decode", "decode step"))
    for batch in (1, 8)
)

ROWS = (FIRST_TOKEN, *NO_CONTEXT, *PEFT)
