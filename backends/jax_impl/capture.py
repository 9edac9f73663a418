"""Capturing keys and values for a static context (clause CAPTURE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from lyra.backends.protocol import CapturedLayer
from lyra.spec.finite import first_token

from .dtype import leave
from .finite import locate
from .forward import Graph, chunks, open_cache, prefill
from .tokens import Tokens, pack_left


def capture(
    graph: Graph,
    ids: np.ndarray,
    layers: Sequence[int],
    chunk_size: int,
    on_chunk: Callable[[int], None] | None = None,
) -> dict[int, CapturedLayer]:
    """Run the unmodified model over ids [1,S] in chunks; k (normed, unrotated) and v of `layers`, [1,Hkv,S,D].

    Every chunk has the same shape; the first one is filled up with padding, whose slots are left out. The rings of the
    sliding-window layers carry them from chunk to chunk. Clauses CAPTURE-1, CAPTURE-2.

    Raises NotFiniteError for keys or values that are NaN or infinite.
    """
    packed = pack_left(Tokens(ids, np.ones(ids.shape, bool)), chunk_size)
    width = packed.ids.shape[1]
    padding = width - ids.shape[1]
    found: dict[int, tuple[list[np.ndarray], list[np.ndarray]]] = {layer: ([], []) for layer in layers}
    cache, wanted = open_cache(graph, 1, width), tuple(sorted(found))
    for start, stop in chunks(width, chunk_size):
        part = packed.ids[:, start:stop], packed.mask[:, start:stop]
        _, cache, captured, _ = prefill(graph, *part, cache, {}, capture=wanted, first=width <= chunk_size)
        for layer, parts in captured.items():
            for held, made in zip(found[layer], parts, strict=True):
                held.append(np.asarray(made).swapaxes(1, 2))
        if on_chunk is not None:
            on_chunk(stop - padding)
    kept = {
        layer: CapturedLayer(*(leave(np.concatenate(part, axis=2)[:, :, padding:]) for part in parts))
        for layer, parts in found.items()
    }
    for layer, pair in sorted(kept.items()):
        for name, values in zip(("keys", "values"), pair, strict=True):
            if not np.isfinite(values).all():
                place = f"the {name} of layer {layer} at token {first_token(values)}"
                raise locate(graph, Tokens(ids, np.ones(ids.shape, bool)), {}, place)
    return kept
