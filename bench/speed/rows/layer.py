"""Rows of one global layer of Gemma-3 12B's shape: decode steps and prefills against a static context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..row import Contestant, Count, Floor, Framework, Line, Race, Rival, Sweep

MODULE = "lyra.speed.contestants.layer_torch"
Q_HEADS, KV_HEADS, HEAD_DIM, LYRA_KV = 16, 8, 256, 4
STATIC, LIVE = 8192, 256
FLOAT32 = 4


def contestant(name: str, framework: Framework, make: str, **options: Any) -> Contestant:
    """The layer as `make` has it, over STATIC and LIVE tokens unless `options`, its own, say otherwise."""
    return Contestant(name, framework, make, {"static": STATIC, "live": LIVE, **options})


def lyra(name: str = "Lyra, PyTorch", **options: Any) -> Contestant:
    """Lyra's layer; `options` are those of its contestant."""
    return contestant(name, "torch", f"{MODULE}:lyra", **options)


def hugging_face(name: str = "Hugging Face SDPA", **options: Any) -> Contestant:
    """Hugging Face's layer."""
    return contestant(name, "torch", f"{MODULE}:hugging_face", **options)


def expanded(batch: int) -> Contestant:
    """SDPA over the context expanded to the batch."""
    return contestant("SDPA, context expanded to the batch", "torch", f"{MODULE}:expanded", batch=batch)


def floor(
    static: int = STATIC,
    live: int = LIVE,
    batch: int = 1,
    tokens: int = 1,
    contexts: int = 1,
    at_most: float | None = None,
) -> Floor:
    """What a call has to read and multiply: each context once for half of the heads, every row's live keys."""
    keys = LYRA_KV * static * contexts + batch * KV_HEADS * live
    seen = Q_HEADS * (live - (tokens - 1) / 2) + Q_HEADS * LYRA_KV / KV_HEADS * static
    operations = batch * tokens * seen * HEAD_DIM * 4
    return Floor(2 * keys * HEAD_DIM * FLOAT32, round(operations), at_most)


def costs(
    prefix: str, where: str, subject: Callable[..., Contestant], rival: Callable[..., Contestant]
) -> tuple[Sweep, ...]:
    """What a layer's calls cost over everything that grows; `where` says in words which framework it is in."""
    return (
        Sweep(
            f"{prefix}cost-static",
            f"decode step{where}, batch 1, over the context's length",
            "static",
            (512, 2048, 8192, 32768),
            (Line(subject()), Line(rival())),
            lambda static: floor(static),
        ),
        Sweep(
            f"{prefix}cost-tokens",
            f"prefill{where} against S = {STATIC:,}, over the live tokens of the call",
            "tokens",
            (1, 8, 64, 512),
            (Line(subject(live=512)), Line(rival(live=512))),
            lambda tokens: floor(live=512, tokens=tokens),
            rounds=3,
        ),
        Sweep(
            f"{prefix}cost-batch",
            f"decode step{where}, S = {STATIC:,}, over the rows of the batch",
            "batch",
            (1, 2, 4, 8, 16),
            (Line(subject()), Line(rival())),
            lambda batch: floor(batch=batch),
            rounds=3,
        ),
    )


SIXTEEN = (
    "At 32 queries a KV head the products with the context take about as long as reading it, and the live keys of "
    "sixteen rows, which no row shares, are as many bytes again: on this machine 2.1 to 2.8 floors from run to run, as "
    "much as its bandwidth moves."
)

DECODE = tuple(
    Race(
        f"decode-batch-{batch}",
        f"decode step, 12B-shaped global layer, S = {STATIC:,}, {LIVE} live, batch {batch}",
        lyra(batch=batch),
        (
            Rival(hugging_face(batch=batch), faster),
            Rival(expanded(batch), expanding),
            Rival(lyra("Lyra, a context in each row", batch=batch, contexts=batch)),
        )
        if batch > 1
        else (Rival(hugging_face(), faster),),
        floor(batch=batch, at_most=near),
        quick=batch < 16,
        note=SIXTEEN if batch == 16 else "",
    )
    for batch, faster, expanding, near in ((1, 3.5, None, 1.3), (8, 8.0, 14.0, 2.5), (16, 15.0, 25.0, 2.5))
)

LONG = Race(
    "decode-long",
    "the same, S = 32,768, batch 1; cost per static token against that at S = 8,192",
    lyra("Lyra, PyTorch, S = 32,768", static=4 * STATIC),
    (
        Rival(hugging_face("Hugging Face SDPA, S = 32,768", static=4 * STATIC)),
        Rival(lyra("Lyra, PyTorch, S = 8,192"), 1 / 1.15, per=STATIC, own_per=4 * STATIC),
        Rival(
            lyra("Lyra, PyTorch, 8 contexts of S = 8,192 in turn", layers=8),
            1 / 1.15,
            per=8 * STATIC,
            own_per=4 * STATIC,
        ),
    ),
    floor(4 * STATIC),
    note="Of one context of 8,192 tokens every step reads the same 64 MiB again, which this processor's caches hold: "
    "it takes less than memory's bandwidth allows. 256 MiB do not stay there. Where several contexts of 8,192 tokens "
    "are read in turn, so that they do not stay there either, a token of theirs costs no less than one of 32,768 "
    "(compare `decode-cold`).",
)

COLD = Race(
    "decode-cold",
    "decode step, batch 1, as in a whole model: 8 global layers in turn, more keys than caches hold",
    lyra(layers=8),
    (Rival(hugging_face(layers=8)),),
    Floor(8 * floor().read),
    note="The other decode rows read one layer's keys in every step, as their targets were set; this one is what a "
    "model of many layers meets.",
)

PREFILL = tuple(
    Race(
        f"prefill-{tokens}",
        f"prefill of {tokens:,} live tokens against S = {STATIC:,}, the same layer",
        lyra(live=tokens, tokens=tokens),
        (Rival(hugging_face(live=tokens, tokens=tokens), 1.4),),
        floor(live=tokens, tokens=tokens),
        quick=tokens < 1000,
        rounds=9,
        note=""
        if tokens < 1000
        else "Products are three quarters of the time, the passes of the softmax over the scores the rest. Live "
        "keys that no query of a block sees are left out, which Hugging Face multiplies too. Smaller blocks of "
        "queries, and blocks of keys with a running maximum, were slower. torch's fused CPU kernel returns the "
        "log-sum by which parts are merged and would save the softmax's passes, but it has no gradient for it "
        "and is not used.",
    )
    for tokens in (128, 1024)
)

MEMORY = Count(
    "prefill-memory",
    "memory that a prefill takes beside its inputs, the same layer, at its peak",
    "torch",
    "lyra.speed.contestants.memory_torch:prefill",
    {"tokens": [128, 1024], "static": [STATIC, 4 * STATIC], "at_most": 1.25},
    note="Scores are formed in blocks of queries of a fixed size, whatever T · S is; the rest is the result's size.",
)

COSTS = (
    *costs("", "", lyra, hugging_face),
    Sweep(
        "cost-contexts",
        "decode step, 16 rows, S = 2,048, over the number of contexts that they read",
        "contexts",
        (1, 2, 4, 8, 16),
        (Line(lyra(batch=16, static=2048)), Line(hugging_face(batch=16, static=2048))),
        lambda contexts: floor(2048, batch=16, contexts=contexts),
        rounds=3,
    ),
)

ROWS = (*DECODE, LONG, COLD, *PREFILL, MEMORY, *COSTS)
