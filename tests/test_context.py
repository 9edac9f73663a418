"""The context: its checks, its file, moving, taking, stacking and composing; whose it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_contexts import DIM, assert_same, make_context, make_fingerprint, rewrite

from lyra.spec import ContextError, Fingerprint, ModelSpec, RopeSpec, StaticContext
from lyra.spec.bfloat16 import to_bfloat16
from lyra.spec.fingerprint import hash_vocabulary, hash_weights
from lyra.spec.rotation import rotation_tables

# the file


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [0, 1, 6])
def test_a_saved_context_comes_back_bit_for_bit(tmp_path: Path, batch: int, length: int) -> None:
    context = make_context(length, batch=batch)
    context.save(tmp_path / "c.safetensors")
    assert_same(StaticContext.load(tmp_path / "c.safetensors"), context)
    assert [item.name for item in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_loaded_context_is_mapped_and_read_only(tmp_path: Path) -> None:
    make_context().save(tmp_path / "c.safetensors")
    k = StaticContext.load(tmp_path / "c.safetensors").layers[1].k
    owner = k
    while isinstance(owner.base, np.ndarray) and not isinstance(owner, np.memmap):
        owner = owner.base
    assert isinstance(owner, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        k[0, 0, 0, 0] = 1


def test_a_context_may_be_saved_over_the_file_it_is_mapped_from(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    make_context(6).save(path)
    loaded = StaticContext.load(path)
    (loaded + loaded).save(path)
    assert StaticContext.load(path).num_tokens == 11
    assert_same(loaded, make_context(6))


def test_the_file_holds_the_rotation_of_its_positions(tmp_path: Path) -> None:
    context = make_context().moved(100_000)
    context.save(tmp_path / "c.safetensors")
    arrays = load_file(tmp_path / "c.safetensors")
    exact = np.arange(100_000, 100_006)[:, None] * 1_000_000.0 ** (-2.0 * np.arange(DIM // 2) / DIM)
    np.testing.assert_array_equal(arrays["cos"][0, :, : DIM // 2], np.cos(exact).astype(np.float32))
    np.testing.assert_array_equal(arrays["sin"][0, :, DIM // 2 :], np.sin(exact).astype(np.float32))
    assert arrays["cos"].shape == (1, 6, DIM)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    make_context(4).save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lyra.spec.context_file.write_tensors", fail)
    with pytest.raises(OSError, match="disk full"):
        make_context(5).save(path)
    assert StaticContext.load(path).num_tokens == 4
    assert len(list(tmp_path.iterdir())) == 1


def poison(values: np.ndarray) -> np.ndarray:
    values = values.copy()
    values[0, 0, 2, 0] = np.nan
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "3"}, "format version '3', this Lyra reads '2' and '1'"),
        ({"format": "other"}, "not a context"),
        ({"drop": ("layers.3.v",)}, r"lacks the tensors \['layers\.3\.v'\]"),
        ({"drop": ("cos",)}, r"lacks the tensors \['cos'\]"),
        ({"arrays": {"extra": np.zeros(1, np.float32)}}, r"unknown tensors \['extra'\]"),
        ({"arrays": {"mask": np.ones((1, 5), bool)}}, r"positions has shape \(1, 6\)"),
        ({"arrays": {"mask": np.ones((1, 6), np.float32)}}, "mask has shape .* float32"),
        ({"arrays": {"layers.1.k": np.zeros((1, 3, 6, DIM), np.float32)}}, r"expected float32 \(1, 2, 6, 16\)"),
        ({"arrays": {"layers.1.k": np.zeros((1, 2, 6, DIM), np.float16)}}, "dtype 'F16'"),
        ({"arrays": {"layers.1.k": poison(np.zeros((1, 2, 6, DIM), np.float32))}}, "not finite in 1 visible slots"),
        ({"arrays": {"cos": np.zeros((1, 6, DIM), np.float32)}}, "cos is not that of the positions"),
        ({"arrays": {"positions": np.full((1, 6), -1)}}, "negative"),
        ({"kv_heads": '{"1": [1, 9], "3": [1, 3]}'}, r"KV heads \(1, 9\); expected some of 0 to 3"),
        ({"kv_heads": "none"}, "list of KV heads is not JSON"),
        ({"kv_heads": '{"1": 7, "3": [1, 3]}'}, "list of KV heads is damaged: layer 1 has 7"),
        ({"kv_heads": '{"1": [1, 3], "1": [1, 3]}'}, "list of KV heads is not JSON .'1' stands twice"),
        ({"kv_heads": "[" * 100_000}, "list of KV heads nests more than 64"),
        ({"fingerprint": "{}"}, "fingerprint is damaged"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "book.safetensors"
    make_context().save(path)
    rewrite(path, **change)
    with pytest.raises(ContextError, match=message) as refusal:
        StaticContext.load(path)
    assert str(refusal.value).startswith(f"{path}: ")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.safetensors"
    make_context().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ContextError, match=r"cut\.safetensors: it is no safetensors file, or cut short"):
        StaticContext.load(path)


@pytest.mark.parametrize("name", [None, 5, b"book.safetensors", ["book.safetensors"]])
def test_what_is_no_name_of_a_file_is_refused(name: object) -> None:
    with pytest.raises(ContextError, match="expected its name, got"):
        StaticContext.load(name)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ContextError, match="there is no such file"):
        StaticContext.load(tmp_path / "none.safetensors")


# its checks


def test_nan_is_refused_in_visible_and_in_masked_slots() -> None:
    context = make_context()
    layers = {1: context.layers[1]._replace(v=poison(context.layers[1].v)), 3: context.layers[3]}
    with pytest.raises(
        ContextError, match="v of layer 1 is not finite in 1 visible slots, the first at row 0, token 2"
    ):
        replace(context, layers=layers)
    mask = context.mask.copy()
    mask[0, 2] = False
    with pytest.raises(ContextError, match="masked slot 2 of row 0; fill it with any finite value"):
        replace(context, layers=layers, mask=mask)


def test_an_empty_context_and_a_foreign_layer_are_refused() -> None:
    context = make_context()
    with pytest.raises(ContextError, match="holds no layer"):
        replace(context, layers={})
    with pytest.raises(ContextError, match="layer 2 is not in the fingerprint"):
        replace(context, layers={2: context.layers[1]})


def test_arrays_are_not_writable_through_the_context() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_context().mask[0, 0] = False


# parts of it


def test_static_layer_picks_heads_in_ascending_order() -> None:
    context = make_context(kv_heads=(0, 1, 3))
    part = context.static_layer(3, (3, 0))
    np.testing.assert_array_equal(part.k, context.layers[3].k[:, [0, 2]])
    np.testing.assert_array_equal(part.v, context.layers[3].v[:, [0, 2]])
    assert part.mask is context.mask


def test_static_layer_refuses_what_is_not_there() -> None:
    with pytest.raises(ContextError, match=r"holds KV heads \(1, 3\) of layer 1, not \[0\]"):
        make_context().static_layer(1, (0, 1))
    with pytest.raises(ContextError, match=r"holds layers \[1, 3\], not 5"):
        make_context().static_layer(5, (1,))


def test_take_keeps_heads_of_all_or_of_some_layers() -> None:
    context = make_context()
    assert context.take([3]).kv_heads == {1: (3,), 3: (3,)}
    some = context.take({3: [1]})
    assert some.kv_heads == {3: (1,)}
    assert some.fingerprint.layers == ((3, "three"),)
    np.testing.assert_array_equal(some.layers[3].k, context.layers[3].k[:, :1])
    assert some.nbytes * 4 == context.nbytes


def test_moving_changes_positions_and_not_keys() -> None:
    context = make_context()
    moved = context.moved(1000)
    np.testing.assert_array_equal(moved.positions, context.positions + 1000)
    np.testing.assert_array_equal(moved.layers[1].k, context.layers[1].k)
    with pytest.raises(ContextError, match="negative"):
        context.moved(-1)


# rows and composition


def test_stacked_rows_come_back() -> None:
    rows = [make_context(length, seed=length) for length in (6, 2, 0)]
    stacked = StaticContext.stack(rows)
    assert stacked.batch == 3
    np.testing.assert_array_equal(stacked.mask.sum(axis=1), [6, 2, 0])
    for index, row in enumerate(rows):
        assert_same(stacked.row(index), row)
    with pytest.raises(ContextError, match="no row 3"):
        stacked.row(3)


def test_composition_shifts_positions_and_drops_the_second_bos() -> None:
    first, second = make_context(100), make_context(50, seed=1)
    both = first + second
    assert both.num_tokens == 149
    np.testing.assert_array_equal(both.positions[0], np.arange(149))
    np.testing.assert_array_equal(both.tokens[0], np.concatenate([first.tokens[0], second.tokens[0, 1:]]))
    for number in (1, 3):
        k = np.concatenate([first.layers[number].k, second.layers[number].k[:, :, 1:]], axis=2)
        np.testing.assert_array_equal(both.layers[number].k, k)


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (False, False)])
def test_a_bos_is_dropped_only_where_both_have_one(first: bool, second: bool) -> None:
    assert (make_context(4, bos=first) + make_context(3, seed=1, bos=second)).num_tokens == 7


def test_without_tokens_nothing_is_dropped() -> None:
    both = make_context(4) + replace(make_context(3, seed=1), tokens=None)
    assert both.num_tokens == 7
    assert both.tokens is None


def test_composition_is_associative() -> None:
    a, b, c = (make_context(length, seed=length) for length in (4, 3, 5))
    assert_same((a + b) + c, a + (b + c))


def test_a_moved_context_composes_like_an_unmoved_one() -> None:
    a, b = make_context(4), make_context(3, seed=1)
    assert_same(a + b.moved(500), a + b)
    np.testing.assert_array_equal((a.moved(10) + b).positions[0], np.arange(10, 16))


def test_composition_goes_row_by_row() -> None:
    rows = StaticContext.stack([make_context(5), make_context(2, seed=1)])
    tail = make_context(3, seed=2)
    both = rows + tail
    assert_same(both.row(0), make_context(5) + tail)
    assert_same(both.row(1), make_context(2, seed=1) + tail)
    with pytest.raises(ContextError, match="batch 2 and 3"):
        rows + StaticContext.stack([tail] * 3)


def test_an_empty_context_is_neutral() -> None:
    context = make_context(5)
    empty = make_context(0)
    assert_same(context + empty, context)
    assert_same(empty + context, context)


def test_contexts_that_do_not_go_together() -> None:
    with pytest.raises(ContextError, match=r"KV heads by layer .* use take\(\)"):
        make_context() + make_context(kv_heads=(0, 3))
    other = replace(make_context(), fingerprint=make_fingerprint(layers=((1, "one"), (3, "else"))))
    with pytest.raises(ContextError, match=r"k and v projections or k_norm of layers \[3\] differ"):
        make_context() + other


def test_numbers_in_the_description() -> None:
    context = make_context(6).moved(10)
    found = context.describe()
    assert (found["tokens"], found["next_position"], found["bytes"]) == (6, 16, 2 * 2 * 2 * 6 * DIM * 4)
    assert found["layers"] == {"1": [1, 3], "3": [1, 3]}
    json.dumps(found)
    assert "6 tokens of 'small'" in repr(context)


# whose it is


def test_differences_name_both_values() -> None:
    other = make_fingerprint(
        attention=make_fingerprint().attention.replace(hidden_size=64, rope=RopeSpec(theta=10_000.0)),
        layers=((1, "changed"),),
        tokenizer="other words",
    )
    found = make_fingerprint().differences(other)
    assert found == [
        "hidden_size 32 against 64",
        "rope (theta 1000000.0, factor 1.0) against (theta 10000.0, factor 1.0)",
        "layers [3] are no global layers there",
        "the k and v projections or k_norm of layers [1] differ",
        "the tokenizers' vocabularies differ",
    ]


def test_what_is_no_difference() -> None:
    mine = make_fingerprint(layers=((1, "one"),), tokenizer=None)
    assert mine.differences(make_fingerprint(model="another name")) == []


def test_a_fingerprint_survives_json() -> None:
    for fingerprint in (make_fingerprint(), make_fingerprint(tokenizer=None, bos=None)):
        assert Fingerprint.from_json(fingerprint.to_json()) == fingerprint


def test_bfloat16_rounding_is_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, 1.0040, -2.5, 0.0], np.float32)
    np.testing.assert_array_equal(to_bfloat16(values), np.array([1.0, 1.0, 1.015625, 1.0078125, -2.5, 0.0], np.float32))


def test_a_hash_is_that_of_the_bfloat16_weights_that_make_keys_and_values() -> None:
    rng = np.random.default_rng(0)
    weights = {
        f"{name}.weight": rng.standard_normal((4, 8), dtype=np.float32) for name in ("q_proj", "k_proj", "v_proj")
    }
    digest = hash_weights(weights)
    rounded = {name: to_bfloat16(w) for name, w in weights.items()}
    assert hash_weights(rounded) == digest
    assert hash_weights(weights | {"q_proj.weight": weights["q_proj.weight"] + 1}) == digest
    assert hash_weights(weights | {"v_proj.weight": weights["v_proj.weight"] * 1.01}) != digest
    swapped = weights | {"k_proj.weight": weights["v_proj.weight"], "v_proj.weight": weights["k_proj.weight"]}
    assert hash_weights(swapped) != digest


def test_a_vocabulary_has_one_hash_whatever_its_order() -> None:
    assert hash_vocabulary({"a": 0, "b": 1}) == hash_vocabulary({"b": 1, "a": 0})
    assert hash_vocabulary({"a": 0, "b": 1}) != hash_vocabulary({"a": 1, "b": 0})


def test_a_fingerprint_of_a_model_holds_its_plain_global_layers() -> None:
    spec = ModelSpec.preset("gemma-3-12b-lyra-8q4kv")
    found = Fingerprint.of(spec, {11: "eleven", 5: "five"})
    assert found.attention == ModelSpec.preset("gemma-3-12b").attention
    assert found.layers == ((5, "five"), (11, "eleven"))


def test_rotation_tables_hold_to_float64_far_out() -> None:
    cos, sin = rotation_tables(np.array([131_072]), RopeSpec(theta=1e6, factor=8.0), 4)
    angles = [131_072 / 8, 131_072 / 8 / 1e3]
    np.testing.assert_array_equal(cos[0], np.float32(np.cos(angles * 2)))
    np.testing.assert_array_equal(sin[0], np.float32(np.sin(angles * 2)))
