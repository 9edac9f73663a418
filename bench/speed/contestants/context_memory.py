"""What loading, attaching and reading a context adds to a process's memory, measured in a process of its own.

The model has the global layers of Gemma-3 12B and next to nothing else, so that what is added is the context's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import lyra
from lyra.quantities import size
from lyra.spec.context import ContextLayer, StaticContext
from lyra.spec.fingerprint import Fingerprint
from lyra.spec.model import ModelSpec
from lyra.spec.split import HeadSplit

from ..row import Counted, Finding

MOST = 1.1
LIVE = 16
WIDTH, VOCABULARY = 64, 256
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def attached(backend: str, slots: int, cases: list[tuple[str, int]]) -> Counted:
    """Memory by what the context's file is stored as and the rows of a batch; for float32 held to bounds."""
    findings, rows = [], [["file", "its bytes", "batch", *NAMES.values()]]
    with tempfile.TemporaryDirectory() as folder:
        config = _save_model(Path(folder) / "model")
        for storage, batch in cases:
            path = Path(folder) / f"{storage}.safetensors"
            nbytes = _save_context(config, slots, storage, path)
            found = {name: value / nbytes for name, value in _child(backend, path, batch).items()}
            rows.append([storage, size(path.stat().st_size), str(batch), *(f"{one:.2f}×" for one in found.values())])
            for name in ("peak", "read"):
                what = f"{storage}, batch {batch}: {NAMES[name]} / bytes attended over"
                bound = MOST if storage == "float32" or name == "read" else None
                findings.append(Finding(what, found[name], "×", at_most=bound))
    return Counted(findings, rows)


NAMES = {
    "loaded": "added by loading",
    "attached": "added by attaching",
    "peak": "added at the peak of attaching",
    "read": "added in all, after a step",
}


def measure(backend: str, folder: str, path: str, batch: int) -> dict[str, float]:
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
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
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


def status() -> dict[str, int]:
    """This process's memory in bytes: VmRSS, its part that is no mapped file, RssAnon, and the largest VmRSS, VmHWM."""
    lines = (line.partition(":") for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in lines if value.endswith(" kB")}


def held() -> dict[str, int]:
    """The same without what nobody uses any more: garbage, and what the C library keeps of freed memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status()


def _child(backend: str, path: Path, batch: int) -> dict[str, float]:
    words = [sys.executable, "-P", "-m", __name__, backend, str(path.parent / "model"), str(path), str(batch)]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _save_model(folder: Path) -> dict[str, Any]:
    """A Gemma-3 with the global layers of the 12B, in a folder; its config."""
    preset = ModelSpec.preset("gemma-3-12b")
    layer, layers = preset.attention, len(preset.global_layers)
    config: dict[str, Any] = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": layer.num_attention_heads,
        "num_key_value_heads": layer.num_key_value_heads,
        "head_dim": layer.head_dim,
        "vocab_size": VOCABULARY,
        "query_pre_attn_scalar": round(layer.scale**-2),
        "layer_types": ["full_attention"] * layers,
        "sliding_window": 1024,
        "tie_word_embeddings": True,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    queries, keys = layer.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {f"mlp.{name}_proj": (WIDTH, WIDTH) for name in ("gate", "up", "down")}
    shapes |= {"self_attn.q_proj": (queries, WIDTH), "self_attn.o_proj": (WIDTH, queries)}
    shapes |= {"self_attn.k_proj": (keys, WIDTH), "self_attn.v_proj": (keys, WIDTH)}
    shapes |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (layer.head_dim,))
    shapes |= dict.fromkeys(NORMS, (WIDTH,))
    shapes = {f"model.layers.{n}.{name}.weight": shape for n in range(layers) for name, shape in shapes.items()}
    shapes |= {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    draw = np.random.default_rng(0)
    weights = {name: 0.1 * draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return config


def _save_context(config: dict[str, Any], slots: int, storage: str, path: Path) -> int:
    """A random context of that model for half of its KV heads; the bytes that its float32 keys and values take."""
    spec = ModelSpec.from_hf_config(config)
    heads = HeadSplit.half(spec).bind(spec.attention).lyra_kv_heads
    draw: Callable[..., np.ndarray] = np.random.default_rng(1).standard_normal
    shape = (1, len(heads), slots, spec.attention.head_dim)
    layers = {n: ContextLayer(heads, draw(shape, np.float32), draw(shape, np.float32)) for n in spec.global_layers}
    mark = Fingerprint.of(spec, dict.fromkeys(spec.global_layers, "random"))
    context = StaticContext(layers, np.ones((1, slots), dtype=bool), np.arange(slots)[None], mark)
    context.astype(storage).save(path)
    return context.nbytes


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))))
