"""Rows of the whole 270M: first token, no context, PEFT's prefixes at equal length, and JAX without a context."""

from __future__ import annotations

from typing import Any

from ..row import Contestant, Framework, Race, Rival

STATIC, PROMPT = 4096, 16
PREFILL = 512
PREFIX = 512
"""Tokens of a prefix or context beside PEFT's."""

PARTS = {"prefill": f"prefill of {PREFILL} tokens", "decode": f"decode step behind {PREFILL}"}


def contestant(name: str, make: str, framework: Framework = "torch", **options: Any) -> Contestant:
    """A contestant of model_torch or model_jax."""
    return Contestant(name, framework, f"lyra.speed.contestants.model_{framework}:{make}", options)


def first_token(name: str, make: str, **options: Any) -> Contestant:
    """A way to the first token of a prompt behind a context."""
    return contestant(name, f"first_token_{make}", static=STATIC, tokens=PROMPT, **options)


FIRST_TOKEN = Race(
    "first-token",
    f"time to the first token of a prompt of {PROMPT} tokens, 270M, a {STATIC:,}-token context loaded from its file",
    first_token("Lyra", "lyra"),
    (
        Rival(first_token("Hugging Face, prefill of all", "prefill"), 60.0),
        Rival(first_token("Hugging Face, copied cache", "copied"), 2.0),
        Rival(first_token("Hugging Face, copied cache without windows", "copied", sliding=False)),
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
        for part, what in PARTS.items()
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

XLA = (
    "Most of XLA's time are the products with the weights, which no layout of the operands made faster (as stored, "
    "transposed, both transposed, gate and up in one). Tokens attend in four parts, each to the keys up to its last "
    "one."
)

IN_JAX = tuple(
    Race(
        f"jax-no-context-{part}",
        f"no context, 270M in JAX: {what}; Hugging Face in PyTorch",
        contestant("Lyra, JAX", "plain", "jax", tokens=PREFILL, part=part),
        (Rival(contestant("Hugging Face", "plain", tokens=PREFILL, part=part), 1.0),),
        note=XLA if part == "prefill" else "",
    )
    for part, what in PARTS.items()
)

ROWS = (FIRST_TOKEN, *NO_CONTEXT, *PEFT, *IN_JAX)
