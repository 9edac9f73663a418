"""What contexts cost in bytes, by the presets' sizes, and in nats where they are stored in fewer bits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

import lyra
from lyra.cli.output import size
from lyra.spec.context import ContextLayer, StaticContext
from lyra.spec.model import ModelSpec, presets
from lyra.spec.split import HeadSplit
from lyra.spec.storage import stored, widened
from lyra.studies.cache import full_cache_size, live_cache_size, stored_size

from ..row import Counted, Finding

LENGTHS = (512, 2048, 8192, 32768, 131072)
DOCUMENTS = ("types", "formatstrings", "string-methods", "typesseq", "debugger", "attribute-access")
CONTEXT, NEXT, AGAIN = 512, 256, 255
BACKENDS = ("torch", "jax")
COLUMNS = ("the next 256 tokens", "the same text again")


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
    backends, which read the same files; half of the query heads of every global layer read them, then all.
    """
    loaded = {backend: lyra.load(model, backend=backend) for backend in BACKENDS}
    texts = loaded["torch"].text
    assert texts is not None
    nll: dict[tuple[str, str, int, int], list[np.ndarray]] = {}
    nbytes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in DOCUMENTS:
            ids = texts.encode(topics[name])
            live = ids[CONTEXT : CONTEXT + NEXT], ids[1 : 1 + AGAIN]
            captured = loaded["torch"].capture(ids[:CONTEXT])
            for kind, narrowed in STORED.items():
                path = Path(folder) / "context.safetensors"
                narrow = narrowed(captured)
                nbytes[kind] = narrow.nbytes
                narrow.save(path)
                for backend, one in loaded.items():
                    for heads in (one.spec.num_attention_heads // 2, one.spec.num_attention_heads):
                        one.attach(path, HeadSplit.last_q(one.spec, heads))
                        for column, scored in enumerate(live):
                            found = one.score([ids[0], *scored]).nll[-len(scored) :]
                            nll.setdefault((kind, backend, heads, column), []).append(found)
                    one.detach()
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


def _losses(nll: dict[tuple[str, str, int, int], list[np.ndarray]], nbytes: dict[str, int]) -> Counted:
    """What each way of storing loses against float32, on the mean and by token, and the table of all."""
    findings = []
    rows = [
        ["stored as", "bytes", "backend", "heads", *(f"{one}: NLL, loss, mean size of a change" for one in COLUMNS)]
    ]
    for kind in nbytes:
        worst = 0.0
        for backend, heads in sorted({(key[1], key[2]) for key in nll if key[0] == kind}, reverse=True):
            cells = []
            for column in range(len(COLUMNS)):
                found, exact = (nll[one, backend, heads, column] for one in (kind, "float32"))
                loss = float(np.mean([a.mean() - b.mean() for a, b in zip(found, exact, strict=True)]))
                change = float(np.mean([np.abs(a - b).mean() for a, b in zip(found, exact, strict=True)]))
                worst = max(worst, abs(loss))
                cells.append(f"{np.mean([one.mean() for one in found]):.4f}, {loss:+.4f}, {change:.4f}")
            rows.append([kind, f"{nbytes[kind] / nbytes['float32']:.1%}", backend, str(heads), *cells])
        if kind != "float32":
            bound = MOST_NATS if kind in BOUNDED else None
            findings.append(Finding(f"{kind}: largest change of a mean NLL", worst, "nats", at_most=bound))
            findings.append(Finding(f"{kind}: bytes / those of float32", nbytes[kind] / nbytes["float32"], "×"))
    return Counted(findings, rows)
