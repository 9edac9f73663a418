"""Small contexts that several tests share, how they are compared, and a file of one with something in it changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lyra.spec import AttentionSpec, ContextLayer, Fingerprint, StaticContext
from lyra.spec.digest import sealed

BOS = 2
HEADS, KV_HEADS, DIM = 8, 4, 16


def make_fingerprint(**changes: object) -> Fingerprint:
    attention = AttentionSpec(
        hidden_size=32, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, scale=0.25
    )
    fields = {
        "model": "small",
        "attention": attention,
        "layers": ((1, "one"), (3, "three")),
        "tokenizer": "words",
        "bos": BOS,
    }
    return Fingerprint(**(fields | changes))


def make_context(length: int = 6, *, batch: int = 1, seed: int = 0, kv_heads=(1, 3), bos: bool = True) -> StaticContext:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, 99, (batch, length))
    if bos:
        tokens[:, :1] = BOS
    shape = (batch, len(kv_heads), length, DIM)
    return StaticContext(
        layers={
            number: ContextLayer(
                kv_heads,
                rng.standard_normal(shape, dtype=np.float32),
                rng.standard_normal(shape, dtype=np.float32),
            )
            for number in (1, 3)
        },
        mask=np.ones((batch, length), dtype=bool),
        positions=np.tile(np.arange(length), (batch, 1)),
        tokens=tokens,
        fingerprint=make_fingerprint(),
    )


def assert_same(found: StaticContext, expected: StaticContext) -> None:
    assert found.fingerprint == expected.fingerprint
    assert found.kv_heads == expected.kv_heads
    for name in ("mask", "positions", "tokens"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    for number, layer in expected.layers.items():
        np.testing.assert_array_equal(found.layers[number].k, layer.k)
        np.testing.assert_array_equal(found.layers[number].v, layer.v)


def rewrite(path: Path, arrays: dict | None = None, drop: tuple[str, ...] = (), **metadata: str) -> None:
    """Change a file as someone would who knows of its digests: what is left to refuse it are the other checks."""
    with safe_open(path, framework="numpy") as file:
        old = {name: value for name, value in file.metadata().items() if "digest" not in name}
    kept = {name: value for name, value in (load_file(path) | (arrays or {})).items() if name not in drop}
    known = all(value.dtype != np.float16 for value in kept.values())
    save_file(kept, path, sealed(old | metadata, kept) if known else old | metadata)
