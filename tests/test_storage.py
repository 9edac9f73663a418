"""Contexts in fewer bits: what is rounded and when, what a file holds, what every backend makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from small_contexts import DIM, assert_same, make_context, rewrite
from typer.testing import CliRunner

import lyra
from lyra.cli import application
from lyra.spec import AttentionSpec, ContextError, ContextLayer, HeadSplit, StaticContext
from lyra.spec.bfloat16 import to_bfloat16
from lyra.spec.inputs import StaticLayer
from lyra.spec.storage import BFLOAT16, Int8, stored

NARROW = ("bfloat16", "int8")


def wide(values: object) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


# rounding


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    context = make_context().astype("bfloat16")
    k = context.layers[1].k
    assert k.dtype == BFLOAT16
    np.testing.assert_array_equal(wide(k), to_bfloat16(make_context().layers[1].k))


def test_the_example_of_the_spec() -> None:
    k = np.array([1.0, -254.0, 0.9], np.float32).reshape(1, 1, 3, 1)
    made = stored(k, "int8", np.ones((1, 3), bool), by_channel=True)
    assert (made.scales.item(), made.codes.ravel().tolist()) == (2.0, [0, -127, 0])


def test_keys_have_a_scale_a_channel_and_values_one_a_token() -> None:
    held, made = make_context().layers[1], make_context().astype("int8").layers[1]
    assert made.k.scales.shape == (1, 2, 1, DIM)
    assert made.v.scales.shape == (1, 2, 6, 1)
    np.testing.assert_array_equal(made.k.scales[0, :, 0], np.abs(held.k[0]).max(axis=1) / np.float32(127))
    np.testing.assert_array_equal(made.v.scales[0, ..., 0], np.abs(held.v[0]).max(axis=2) / np.float32(127))
    for values, exact in ((made.k, held.k), (made.v, held.v)):
        steps = values.scales[:, :, values.blocks[0]]
        assert (np.abs(wide(values) - exact) <= steps * 0.50001).all()
        assert np.abs(values.codes).max() == 127


def test_a_masked_slot_decides_no_scale() -> None:
    context = make_context()
    layers = {n: layer._replace(k=layer.k.copy(), v=layer.v.copy()) for n, layer in context.layers.items()}
    mask = context.mask.copy()
    mask[0, 2] = False
    for layer in layers.values():
        layer.k[0, :, 2] = layer.v[0, :, 2] = 3e38
    for dtype in NARROW:
        found = replace(context, mask=mask, layers=layers).astype(dtype)
        zeroed = replace(context, mask=mask).astype(dtype)
        np.testing.assert_array_equal(wide(found.layers[1].k), wide(zeroed.layers[1].k))
        assert not wide(found.layers[1].v)[:, :, 2].any()


def test_zeros_and_tiny_numbers_stay_finite() -> None:
    tiny = np.array([0.0, 1e-45, -190e-45, 1e-38], np.float32).reshape(1, 1, 4, 1)
    for by_channel in (True, False):
        made = stored(tiny, "int8", np.ones((1, 4), bool), by_channel=by_channel)
        np.testing.assert_allclose(wide(made), tiny, atol=1e-40)


def test_what_is_too_large_for_bfloat16_is_refused() -> None:
    context = make_context()
    layers = {n: layer._replace(v=np.full_like(layer.v, 3.4e38)) for n, layer in context.layers.items()}
    with pytest.raises(ContextError, match="v of layer 1 is not finite in 6 visible slots"):
        replace(context, layers=layers).astype("bfloat16")


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_happens_once(dtype: str) -> None:
    made = make_context(batch=2).astype(dtype)
    assert_values(made.astype("float32").astype(dtype), made)
    assert made.astype(dtype).layers[1].k.shape == made.layers[1].k.shape
    assert make_context().astype("float32").layers[1].k.dtype == np.float32


def assert_values(found: StaticContext, expected: StaticContext) -> None:
    assert found.kv_heads == expected.kv_heads
    np.testing.assert_array_equal(found.mask, expected.mask)
    for number, layer in expected.layers.items():
        np.testing.assert_allclose(wide(found.layers[number].k), wide(layer.k), rtol=1e-6)
        np.testing.assert_allclose(wide(found.layers[number].v), wide(layer.v), rtol=1e-6)


# parts, rows, composition


@pytest.mark.parametrize("dtype", NARROW)
def test_operations_change_no_value(dtype: str) -> None:
    first, second = (make_context(length, seed=length, kv_heads=(0, 1, 3)).astype(dtype) for length in (5, 3))
    exact = [one.astype("float32") for one in (first, second)]
    stack = StaticContext.stack([first, second])
    for found, expected in (
        (first + second, exact[0] + exact[1]),
        (first.moved(9) + second, exact[0].moved(9) + exact[1]),
        (stack, StaticContext.stack(exact)),
        (stack.row(1), exact[1]),
        (stack + second, StaticContext.stack(exact) + exact[1]),
        (first.take({3: (0, 3)}), exact[0].take({3: (0, 3)})),
        (first.take([1, 3]), exact[0].take([1, 3])),
        (first + make_context(0, kv_heads=(0, 1, 3)).astype(dtype), exact[0]),
        (make_context(0, kv_heads=(0, 1, 3)).astype(dtype) + first, exact[0]),
    ):
        assert found.dtype == dtype
        assert_same(found.astype("float32"), expected)


def test_scales_that_nothing_uses_are_left_out() -> None:
    first = make_context(5).astype("int8")
    both = StaticContext.stack([first, make_context(2, seed=1).astype("int8")])
    assert both.layers[1].v.scales.shape == (2, 2, 5, 1)
    assert both.row(1).layers[1].v.scales.shape == (1, 2, 2, 1)
    assert (first + first).layers[1].k.scales.shape == (1, 2, 2, DIM)


def test_contexts_that_are_stored_otherwise_do_not_go_together() -> None:
    with pytest.raises(ContextError, match=r"stored as int8 against float32; use astype\(\)"):
        make_context().astype("int8") + make_context()
    context, narrow = make_context(), make_context().astype("int8")
    with pytest.raises(ContextError, match=r"stored as \['float32', 'int8'\]; a context has one type"):
        replace(context, layers={1: context.layers[1], 3: narrow.layers[3]})
    with pytest.raises(ContextError, match="dtype is 'int4'; a context is stored as one of float32, bfloat16, int8"):
        context.astype("int4")


def test_parts_that_contradict_each_other_are_refused() -> None:
    k = make_context().astype("int8").layers[1].k
    for change, message in (
        ({"codes": k.codes.astype(np.int16)}, "expected int8, float32 and int32"),
        ({"scales": k.scales[:, :1]}, r"scales have shape \(1, 1, 1, 16\); expected \(1, 2, blocks, 16 or 1\)"),
        ({"scales": k.scales[..., :3]}, "expected .* 16 or 1"),
        ({"blocks": k.blocks[:, :3]}, r"blocks have shape \(1, 3\); expected \(1, 6\)"),
        ({"blocks": k.blocks + 1}, "not all among 0 to 0"),
        ({"blocks": k.blocks - 1}, "not all among 0 to 0"),
    ):
        with pytest.raises(ContextError, match=message):
            replace(k, **change)
    context = make_context().astype("int8")
    layer = context.layers[1]._replace(k=replace(k, scales=np.full_like(k.scales, np.inf)))
    with pytest.raises(ContextError, match="k of layer 1 is not finite"):
        replace(context, layers={1: layer})


# the file


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("length", [0, 6])
def test_a_saved_context_comes_back_bit_for_bit(tmp_path: Path, dtype: str, length: int) -> None:
    context = make_context(length, batch=2).astype(dtype)
    context.save(tmp_path / "c.safetensors")
    again = StaticContext.load(tmp_path / "c.safetensors")
    assert (again.dtype, again.nbytes) == (dtype, context.nbytes)
    assert_same(again, context)
    assert f"batch 2, {dtype}" in repr(again)


def test_a_file_takes_as_many_bytes_as_its_values(tmp_path: Path) -> None:
    context = make_context(256, kv_heads=(0, 1, 2, 3))
    held = {dtype: context.astype(dtype).nbytes for dtype in ("float32", *NARROW)}
    assert held["bfloat16"] * 2 == held["float32"]
    values = held["float32"] // 4
    assert held["int8"] == values + 2 * 4 * 4 * (DIM + 256) + 2 * 2 * 4 * 256
    sizes = {}
    for dtype in held:
        context.astype(dtype).save(tmp_path / dtype)
        sizes[dtype] = (tmp_path / dtype).stat().st_size - held[dtype]
    assert max(sizes.values()) - min(sizes.values()) < 2048


def test_a_damaged_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "book.safetensors"
    make_context().astype("int8").save(path)
    whole = load_file(path)
    for change, message in (
        ({"layers.1.k": whole["layers.1.k"][0]}, r"layers\.1\.k: codes have shape \(2, 6, 16\)"),
        ({"layers.1.k.scales": None}, r"lacks the tensors \['layers\.1\.k\.scales'\]"),
        ({"layers.1.k.blocks": whole["layers.1.k.blocks"] + 7}, r"layers\.1\.k: blocks are not all among 0 to 0"),
        ({"layers.1.k": whole["layers.1.k"].float()}, r"unknown tensors \['layers\.1\.k\.blocks"),
        ({"layers.3.v.scales": whole["layers.3.v.scales"] * float("nan")}, "v of layer 3 is not finite"),
    ):
        make_context().astype("int8").save(path)
        rewrite(
            path,
            {name: tensor.numpy() for name, tensor in change.items() if tensor is not None},
            tuple(name for name, tensor in change.items() if tensor is None),
        )
        with pytest.raises(ContextError, match=message) as refusal:
            StaticContext.load(path)
        assert str(refusal.value).startswith(f"{path}: ")


# models


@pytest.mark.parametrize("dtype", NARROW)
def test_a_model_reads_what_the_file_stands_for(backend: str, dtype: str, tiny_folder: Path, tmp_path: Path) -> None:
    model = lyra.load(tiny_folder, backend=backend)
    ids = np.arange(4, 30)
    exact = model.capture(np.arange(2, 40))
    narrow = exact.astype(dtype)
    narrow.save(tmp_path / "c.safetensors")
    model.attach(exact)
    with_exact = model.logits(ids)
    model.attach(tmp_path / "c.safetensors")
    assert model.context is not None
    assert model.context.dtype == dtype
    found = model.logits(ids)
    model.attach(narrow.astype("float32"))
    np.testing.assert_array_equal(found, model.logits(ids))
    off = np.abs(found - with_exact).max() / np.abs(with_exact).max()
    assert 0 < off < 0.02
    model.detach()


def test_a_tuned_context_is_float32(tiny_folder: Path) -> None:
    pytest.importorskip("torch")
    from lyra.backends.torch_impl import GemmaInjector

    model = lyra.load(tiny_folder)
    context = model.capture(np.arange(2, 12)).astype("int8")
    with GemmaInjector(model.module).enable(context, trainable=True) as injector:
        tuned = injector.context()
    assert tuned.dtype == "float32"
    assert_values(tuned, context.astype("float32"))


def test_capture_stores_what_is_asked_for(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LYRA_MODEL", str(tiny_folder))
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("the hand and the note of the other", encoding="utf-8")
    done = CliRunner().invoke(application(), ["capture", "book.txt", "book.safetensors", "--store", "int8"])
    assert done.exit_code == 0, done.output
    assert StaticContext.load("book.safetensors").dtype == "int8"
    shown = CliRunner().invoke(application(), ["inspect", "book.safetensors"])
    assert "in int8" in shown.output
    refused = CliRunner().invoke(application(), ["capture", "book.txt", "b.safetensors", "--store", "int4"])
    assert refused.exit_code == 2


def test_layers_are_widened_one_at_a_time() -> None:
    from lyra.spec.attaching import StaticLayers

    context = make_context().astype("int8")
    layers = StaticLayers(context, {1: (1, 3), 3: (3,)})
    assert (len(layers), list(layers)) == (2, [1, 3])
    np.testing.assert_array_equal(layers[3].k, wide(context.layers[3].k)[:, 1:])
    assert layers[1].k is not layers[1].k
    assert layers.get(2) is None
    with pytest.raises(ContextError, match="holds layers"):
        StaticLayers(context, {2: (1,)})


def test_heads_side_by_side_are_not_copied() -> None:
    context = make_context(kv_heads=(0, 1, 2, 3))
    assert np.shares_memory(context.static_layer(1, (1, 2)).k, context.layers[1].k)
    assert not np.shares_memory(context.static_layer(1, (0, 3)).k, context.layers[1].k)
    assert isinstance(context.astype("int8").layers[1].k, Int8)
    assert isinstance(context.layers[1], ContextLayer)


def masked_layer(batch: int) -> tuple[AttentionSpec, StaticLayer]:
    """A layer of 40 slots, some of them hidden, for two KV heads, and the spec that reads it."""
    context = make_context(40, batch=batch, kv_heads=(1, 3)).moved(5)
    mask = context.mask.copy()
    mask[0, [0, 3, 7, 39]] = False
    spec = context.fingerprint.attention
    spec = spec.replace(split=HeadSplit.from_kv_heads(spec, (1, 3)))
    return spec, replace(context, mask=mask).static_layer(1, (1, 3))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_context_taken_in_by_tiles_is_the_same(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from lyra.backends.torch_impl import static
    from lyra.backends.torch_impl.rope import inverse_frequencies

    spec, layer = masked_layer(batch)
    placed, frequencies = static.place_static(spec, layer), inverse_frequencies(spec)
    assert placed is not None
    whole = static.rotate_static(placed, frequencies)
    monkeypatch.setattr(static, "TILE", batch * 2 * DIM * 7)
    found = static.prepare_static(placed, frequencies)
    assert found.keys.stride() == whole.keys.stride()
    for in_tiles, at_once in zip(found[:4], whole[:4], strict=True):
        assert (in_tiles is None) == (at_once is None)
        if in_tiles is not None:
            np.testing.assert_array_equal(in_tiles.numpy(), at_once.numpy())
    assert static.place_static(spec, layer._replace(mask=np.zeros_like(layer.mask))) is None


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("slots_a_tile", [3, 10, 40])
def test_jax_takes_a_context_in_by_tiles(batch: int, slots_a_tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jax")
    from lyra.backends.jax_impl import static
    from lyra.backends.jax_impl.rope import inverse_frequencies

    spec, layer = masked_layer(batch)
    placed, frequencies = static.place_static(spec, layer), inverse_frequencies(spec)
    assert placed is not None
    whole = static.rotate_static(placed, frequencies)
    lengths: list[int] = []
    turn = static._turn_values

    def noted(v: Any) -> Any:
        lengths.append(v.shape[2])
        return turn(v)

    monkeypatch.setattr(static, "_turn_values", noted)
    monkeypatch.setattr(static, "TILE", batch * 2 * DIM * slots_a_tile)
    found = static.prepare_static(placed, frequencies)
    np.testing.assert_allclose(found.keys, whole.keys, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.values, whole.values)
    np.testing.assert_array_equal(found.visible, whole.visible)
    np.testing.assert_array_equal(whole.values, layer.v.swapaxes(2, 3))
    assert sum(lengths) == 40
    assert slots_a_tile / 2 < max(lengths) <= max(slots_a_tile, 5)  # 40 is halved three times, then it is odd


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_the_size_of_a_context_is_known_before_there_is_one(dtype: str) -> None:
    from lyra.spec import HeadSplit, ModelSpec
    from lyra.studies.cache import stored_size

    context = make_context(40, kv_heads=(2, 3)).astype(dtype)
    attention = context.fingerprint.attention
    attention = attention.replace(split=HeadSplit.last_kv(attention, 2))
    small = ModelSpec("small", vocab_size=9, intermediate_size=8, pattern=("global", "global"), attention=attention)
    assert stored_size(small, 40, dtype) == context.nbytes
