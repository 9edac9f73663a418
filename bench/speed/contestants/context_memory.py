"""What loading, attaching and reading a context adds to a process's memory, measured in a process of its own.

The model has the global layers of Gemma-3 12B and next to nothing else, so that what is added is the context's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import lyra
from lyra.quantities import size
from lyra.spec.context import ContextLayer, StaticContext
from lyra.spec.fingerprint import Fingerprint
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from ..row import Counted, Finding
from .process_memory import alone, forget_peak, held, status

MOST = 1.1
LIVE = 16
NAMES = {
    "loaded": "added by loading",
    "attached": "added by attaching",
    "peak": "added at the peak of attaching",
    "read": "added in all, after a step",
}


def attached(backend: str, slots: int, cases: list[tuple[str, int]]) -> Counted:
    """Memory by what the context's file is stored as and the rows of a batch; for float32 held to bounds."""
    findings, rows = [], [["file", "its bytes", "batch", *NAMES.values()]]
    with tempfile.TemporaryDirectory() as folder:
        spec = alone(save_model, folder)
        for storage, batch in cases:
            path = Path(folder) / f"{storage}.safetensors"
            nbytes = _save_context(spec, slots, storage, path)
            shares = {name: value / nbytes for name, value in alone(measure, backend, folder, path, batch).items()}
            cells = [f"{share:.2f}×" for share in shares.values()]
            rows.append([storage, size(path.stat().st_size), str(batch), *cells])
            for name in ("peak", "read"):
                what = f"{storage}, batch {batch}: {NAMES[name]} / bytes attended over"
                bound = MOST if storage == "float32" or name == "read" else None
                findings.append(Finding(what, shares[name], "×", at_most=bound))
    return Counted(findings, rows)


def measure(backend: str, folder: str, path: Path, batch: int) -> dict[str, float]:
    """Bytes added by loading, by attaching, at its peak, and since before loading after a step over `batch` rows.

    The context has been attached, read and taken off once before: what is compiled then is not the context's. What the
    C library keeps of freed memory is given back before each reading; the peak is the kernel's own. Pages of the mapped
    file do not count: they are the system's, which may drop them.
    """
    model = lyra.load(folder, backend=backend)
    ids = np.tile(np.arange(2, 2 + LIVE), (batch, 1))

    def attach() -> None:
        model.attach(context, override=True)
        if backend == "jax":
            import jax

            jax.block_until_ready(model.engine._attached)  # type: ignore[attr-defined]

    context = StaticContext.load(path)
    attach()
    model.engine.generate(ids, max_new_tokens=2)
    model.detach()
    del context
    start = held()["RssAnon"]
    context = StaticContext.load(path)
    loaded = held()
    forget_peak()
    attach()
    peak = status()["VmHWM"]
    after = held()
    model.engine.generate(ids, max_new_tokens=2)
    read = held()["RssAnon"]
    return {
        "loaded": loaded["RssAnon"] - start,
        "attached": after["RssAnon"] - loaded["RssAnon"],
        "peak": peak - loaded["VmRSS"] - (after["RssFile"] - loaded["RssFile"]),
        "read": read - start,
    }


def save_model(folder: str) -> ModelSpec:
    """Write a Gemma-3 with the global layers of the 12B and random weights into a folder; its spec."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    preset = ModelSpec.preset("gemma-3-12b")
    layer, layers = preset.attention, len(preset.global_layers)
    config = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=layer.num_attention_heads,
        num_key_value_heads=layer.num_key_value_heads,
        head_dim=layer.head_dim,
        vocab_size=256,
        query_pre_attn_scalar=round(layer.scale**-2),
        layer_types=["full_attention"] * layers,
        sliding_window=1024,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return ModelSpec.from_hf_config(config.to_dict())


def _save_context(spec: ModelSpec, slots: int, storage: str, path: Path) -> int:
    """A random context of that model for half of its KV heads; the bytes that its float32 keys and values take."""
    heads = HeadSplit.half(spec).bind(spec.attention).lyra_kv_heads
    draw: Callable[..., np.ndarray] = np.random.default_rng(1).standard_normal
    shape = (1, len(heads), slots, spec.attention.head_dim)
    layers = {n: ContextLayer(heads, draw(shape, np.float32), draw(shape, np.float32)) for n in spec.global_layers}
    mark = Fingerprint.of(spec, dict.fromkeys(spec.global_layers, "random"))
    context = StaticContext(layers, np.ones((1, slots), dtype=bool), np.arange(slots)[None], mark)
    context.astype(storage).save(path)
    return context.nbytes
