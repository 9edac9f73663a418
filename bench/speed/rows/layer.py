"""Rows of one global layer of Gemma-3 12B's shape: decode steps and prefills against a static context, in PyTorch and
in JAX, which is held against Hugging Face in PyTorch and against Lyra there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..row import BACKENDS, Contestant, Count, Floor, Framework, Line, Race, Rival, Sweep

MODULE = "lyra.speed.contestants.layer"
Q_HEADS, KV_HEADS, HEAD_DIM, LYRA_KV = 16, 8, 256, 4
STATIC, LIVE = 8192, 256
FLOAT32 = 4


def contestant(name: str, framework: Framework, make: str, **options: Any) -> Contestant:
    """The layer as `make` has it, over STATIC and LIVE tokens unless `options`, its own, say otherwise."""
    return Contestant(name, framework, f"{MODULE}_{framework}:{make}", {"static": STATIC, "live": LIVE, **options})


def lyra(framework: Framework = "torch", more: str = "", **options: Any) -> Contestant:
    """Lyra's layer; `options` are those of its contestant."""
    return contestant(f"Lyra, {BACKENDS[framework]}{more}", framework, "lyra", **options)


def hugging_face(more: str = "", **options: Any) -> Contestant:
    """Hugging Face's layer."""
    return contestant(f"Hugging Face SDPA{more}", "torch", "hugging_face", **options)


def expanded(batch: int) -> Contestant:
    """SDPA over the context expanded to the batch."""
    return contestant("SDPA, context expanded to the batch", "torch", "expanded", batch=batch)


def each(framework: Framework, batch: int) -> Rival:
    """Lyra's layer where every row has a context of its own."""
    name = "Lyra, a context in each row" if framework == "torch" else "Lyra, JAX, a context in each row"
    return Rival(contestant(name, framework, "lyra", batch=batch, contexts=batch))


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


def costs(prefix: str, where: str, subject: Framework, rival: Callable[..., Contestant]) -> tuple[Sweep, ...]:
    """What a layer's calls cost over everything that grows; `where` says in words which framework it is in."""

    def sweep(option: str, what: str, points: tuple[int, ...], rounds: int = 3, **options: Any) -> Sweep:
        lines = (Line(lyra(subject, **options)), Line(rival(**options)))
        least = partial(_floor_at, option, options)
        return Sweep(f"{prefix}cost-{option}", what, option, points, lines, least, rounds)

    return (
        sweep("static", f"decode step{where}, batch 1, over the context's length", (512, 2048, 8192, 32768), 5),
        sweep(
            "tokens",
            f"prefill{where} against S = {STATIC:,}, over the live tokens of the call",
            (1, 8, 64, 512),
            live=512,
        ),
        sweep("batch", f"decode step{where}, S = {STATIC:,}, over the rows of the batch", (1, 2, 4, 8, 16)),
    )


def _floor_at(option: str, options: dict[str, Any], point: int) -> Floor:
    return floor(**{**options, option: point})


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
            each("torch", batch),
        )
        if batch > 1
        else (Rival(hugging_face(), faster),),
        floor(batch=batch, at_most=near),
        quick=batch < 16,
        note=SIXTEEN if batch == 16 else "",
    )
    for batch, faster, expanding, near in ((1, 3.5, None, 1.3), (8, 8.0, 14.0, 2.5), (16, 15.0, 25.0, 2.5))
)

LONGER = ", S = 32,768"


def per_token(framework: Framework, more: str, contexts: int = 1, **options: Any) -> Rival:
    """The layer over contexts of S = 8,192, whose cost per static token is compared."""
    return Rival(lyra(framework, more, **options), 1 / 1.15, per=contexts * STATIC, own_per=4 * STATIC)


LONG = Race(
    "decode-long",
    "the same, S = 32,768, batch 1; cost per static token against that at S = 8,192",
    lyra(more=LONGER, static=4 * STATIC),
    (
        Rival(hugging_face(LONGER, static=4 * STATIC)),
        per_token("torch", ", S = 8,192"),
        per_token("torch", ", 8 contexts of S = 8,192 in turn", contexts=8, layers=8),
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

SHARED = Sweep(
    "cost-contexts",
    "decode step, 16 rows, S = 2,048, over the number of contexts that they read",
    "contexts",
    (1, 2, 4, 8, 16),
    (Line(lyra(batch=16, static=2048)), Line(hugging_face(batch=16, static=2048))),
    lambda contexts: floor(2048, batch=16, contexts=contexts),
    rounds=3,
)

IN_TORCH = (*DECODE, LONG, COLD, *PREFILL, MEMORY, *costs("", "", "torch", hugging_face), SHARED)

PRODUCTS = (
    "XLA reads keys at the speed of memory for a few queries and multiplies more of them more slowly than PyTorch's "
    "library does. Values of a context lie as columns, one for each key: that takes a tenth to a fifth less time than "
    "rows, at every batch, as long as XLA is kept from turning the product about. Live values stay rows, which are "
    "faster where each row of the batch has its own."
)

PARTS = (
    "The products with the context are most of it, and XLA's take longer than MKL's. Tokens attend to live keys in "
    "four parts, each to those up to its last token, so that three eighths of the scores of the new tokens with each "
    "other are left out."
)

IN_JAX = (
    Race(
        "jax-decode-batch-1",
        f"decode step, 12B-shaped global layer, S = {STATIC:,}, {LIVE} live, batch 1, in JAX",
        lyra("jax"),
        (Rival(hugging_face(), 2.2), Rival(lyra())),
        floor(at_most=1.7),
        quick=True,
    ),
    *(
        Race(
            f"jax-decode-batch-{batch}",
            f"the same, batch {batch}",
            lyra("jax", batch=batch),
            (Rival(hugging_face(batch=batch)), Rival(lyra(batch=batch), 1 / 1.5), each("jax", batch)),
            floor(batch=batch),
            note=PRODUCTS if batch == 16 else "",
        )
        for batch in (8, 16)
    ),
    Race(
        "jax-decode-long",
        LONG.what,
        lyra("jax", LONGER, static=4 * STATIC),
        (Rival(hugging_face(LONGER, static=4 * STATIC)), per_token("jax", ", S = 8,192")),
        floor(4 * STATIC),
    ),
    *(
        Race(
            f"jax-prefill-{tokens}",
            f"prefill of {tokens:,} live tokens against S = {STATIC:,}, the same layer in JAX",
            lyra("jax", live=tokens, tokens=tokens),
            (Rival(hugging_face(live=tokens, tokens=tokens), 1.4), Rival(lyra(live=tokens, tokens=tokens))),
            floor(live=tokens, tokens=tokens),
            rounds=9,
            note="" if tokens < 1000 else PARTS,
        )
        for tokens in (128, 1024)
    ),
    *costs("jax-", " in JAX", "jax", lyra),
)

ROWS = (*IN_TORCH, *IN_JAX)
