"""What contexts cost in bytes, by the presets' sizes, and in nats where they are stored in fewer bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

import lyra
from lyra.choosing.documents import HELD_OUT
from lyra.quantities import size
from lyra.spec.context import ContextLayer, StaticContext
from lyra.spec.model import ModelSpec, presets
from lyra.spec.split import HeadSplit
from lyra.spec.storage import stored, widened
from lyra.studies.cache import full_cache_size, live_cache_size, stored_size

from ..row import Counted, Finding

LENGTHS = (512, 2048, 8192, 32768, 131072)
CONTEXT, NEXT, AGAIN = 512, 256, 255
BACKENDS = ("torch", "jax")
COLUMNS = ("next 256 tokens", "same text again")
Scores = dict[tuple[str, str, int], list[np.ndarray]]
"""Negative log-likelihoods of every document's tokens, by what is stored, backend and column."""


def preset_bytes(dtype: str) -> Counted:
    """Every preset's caches in `dtype` and its context, half of the heads reading it, in `dtype` and in int8."""
    findings, rows = [], [["", f"{dtype} unless it says otherwise", *(f"{length:,}" for length in LENGTHS)]]
    for name in presets():
        model = ModelSpec.preset(name)
        split = model if model.attention.split or model.splits else model.with_split(HeadSplit.half(model))
        counted: dict[str, list[int]] = {
            "full cache": [full_cache_size(model, length, dtype=dtype) for length in LENGTHS],
            "Hugging Face's cache": [live_cache_size(model, length, dtype=dtype) for length in LENGTHS],
            "context": [stored_size(split, length, dtype) for length in LENGTHS],
            "context, int8": [stored_size(split, length, "int8") for length in LENGTHS],
        }
        if model.sliding is None:
            del counted["full cache"]  # Hugging Face's is one
        for number, (kind, values) in enumerate(counted.items()):
            rows.append([name if number == 0 else "", kind, *(size(value) for value in values)])
        if model.sliding is not None:
            share = counted["context"][-1] / counted["full cache"][-1]
            twelfth = name.startswith("gemma-3-12b")
            findings.append(Finding(f"{name}: context / full cache", share, "×", at_most=1 / 12 if twelfth else None))
            share = counted["context"][-1] / counted["Hugging Face's cache"][-1]
            what = f"{name}: context / Hugging Face's cache, S = {LENGTHS[-1]:,}"
            findings.append(Finding(what, share, "×", at_most=1 / 2 if model.num_key_value_heads > 1 else None))
    return Counted(findings, rows)


def storage_loss(model: str) -> Counted:
    """Mean NLL of six documents under contexts of their first 512 tokens, by what these are stored as, on both
    backends, which read the same files. The last half of the query heads of every global layer reads them.
    """
    loaded = {backend: lyra.load(model, backend=backend) for backend in BACKENDS}
    texts = loaded["torch"].text
    assert texts is not None
    nll: Scores = {}
    nbytes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in HELD_OUT:
            ids = texts.encode(topics[name])
            live = ids[CONTEXT : CONTEXT + NEXT], ids[1 : 1 + AGAIN]
            captured = loaded["torch"].capture(ids[:CONTEXT])
            for kind, narrowed in STORED.items():
                path = Path(folder) / "context.safetensors"
                narrow = narrowed(captured)
                nbytes[kind] = narrow.nbytes
                narrow.save(path)
                for backend, engine in loaded.items():
                    engine.attach(path, HeadSplit.half(engine.spec))
                    for column, scored in enumerate(live):
                        found = engine.score([ids[0], *scored]).nll[-len(scored) :]
                        nll.setdefault((kind, backend, column), []).append(found)
                    engine.detach()
    return _losses(nll, nbytes)


def _by_token(context: StaticContext) -> StaticContext:
    """int8 with one scale a token for keys too, which is not what `astype` does."""

    def narrow(layer: ContextLayer) -> ContextLayer:
        k, v = (stored(widened(part), "int8", context.mask, by_channel=False) for part in (layer.k, layer.v))
        return ContextLayer(layer.kv_heads, k, v)

    return replace(context, layers={number: narrow(layer) for number, layer in context.layers.items()})


STORED: dict[str, Callable[[StaticContext], StaticContext]] = {
    "float32": lambda context: context,
    "bfloat16": lambda context: context.astype("bfloat16"),
    "int8": lambda context: context.astype("int8"),
    "int8, keys by token": _by_token,
}
"""What contexts are stored as; the last shows why keys are scaled by channel."""

BOUNDED = {"bfloat16", "int8"}
MOST_NATS = 0.01


def _losses(nll: Scores, nbytes: dict[str, int]) -> Counted:
    """What each way of storing loses against float32, on the mean and by token, and the table of all."""
    findings = []
    parts = ("NLL", "loss", "a token's change")
    rows = [["stored as", "bytes", "backend", *(f"{column}: {part}" for column in COLUMNS for part in parts)]]
    for kind, size_of in nbytes.items():
        losses = []
        for backend in BACKENDS:
            cells = []
            for column in range(len(COLUMNS)):
                pairs = list(zip(*(nll[storage, backend, column] for storage in (kind, "float32")), strict=True))
                value = np.mean([found.mean() for found, _ in pairs])
                losses.append(float(np.mean([found.mean() - exact.mean() for found, exact in pairs])))
                change = np.mean([np.abs(found - exact).mean() for found, exact in pairs])
                cells += [f"{value:.4f}", f"{losses[-1]:+.4f}", f"{change:.4f}"]
            rows.append([kind, f"{size_of / nbytes['float32']:.1%}", backend, *cells])
        if kind != "float32":
            bound = MOST_NATS if kind in BOUNDED else None
            findings.append(
                Finding(f"{kind}: largest change of a mean NLL", max(map(abs, losses)), "nats", at_most=bound)
            )
            findings.append(Finding(f"{kind}: bytes / those of float32", size_of / nbytes["float32"], "×"))
    return Counted(findings, rows)
