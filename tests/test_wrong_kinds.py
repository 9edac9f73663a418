"""Arguments of the wrong kind to everything that is called from outside: one clear error, never that of a library."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lyra
from lyra import ContextError, HeadSplit, InputError, ModelError, ModelSpec, SpecError, StaticContext, StaticSpec
from lyra.backends.protocol import ModelBackend, get_backend

IDS = [2, 270, 271, 272]
SPEC = ModelSpec.preset("gemma-3-12b")


@pytest.fixture(scope="module")
def context(tiny_folder: Path) -> StaticContext:
    return lyra.load(tiny_folder).capture(IDS)


def refused(call: Callable[[], Any], message: str, *kinds: type[Exception]) -> None:
    with pytest.raises(kinds or InputError, match=re.escape(message)) as caught:
        call()
    assert type(caught.value) in (kinds or (InputError,))
    assert "\n" not in str(caught.value)


def dtypes() -> list[Any]:
    """Dtypes that are no names."""
    import jax.numpy as jnp
    import torch

    return [torch.float32, np.float32, np.dtype(np.float32), jnp.bfloat16, None, 32, ["float32"], b"float32", "float64"]


@pytest.mark.parametrize("number", range(9))
def test_a_dtype_that_is_none(backend: str, tiny_folder: Path, number: int) -> None:
    names = {"torch": "'float32', 'bfloat16' or 'float16'", "jax": "'float32' or 'bfloat16'"}[backend]
    refused(lambda: lyra.load(tiny_folder, backend=backend, dtype=dtypes()[number]), f"; expected {names}")


@pytest.mark.parametrize("device", ["warp", "", "cpu:x", "cpu:-1", "cpu:77", "meta", "tpu:9", 0, 1.5, b"cpu", ["cpu"]])
def test_a_device_that_is_not_there(
    backend: str, tiny_folder: Path, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a weight is read, and in the same words."""
    for module in ("lyra.backends.torch_impl.model", "lyra.backends.jax_impl.model"):
        monkeypatch.setattr(f"{module}.open_checkpoint", lambda _: pytest.fail("the folder was read"))
    name = {"torch": "PyTorch", "jax": "JAX"}[backend]
    maker = get_backend(backend)
    assert isinstance(maker, ModelBackend)
    refused(lambda: maker.load(str(tiny_folder), device=device), f"device is {device!r}; {name} has '")


def test_devices_that_are_there(backend: str) -> None:
    if backend == "torch":
        import torch

        from lyra.backends.torch_impl.device import device_named

        assert device_named(None) == device_named("cpu") == device_named(torch.device("cpu")) == torch.device("cpu")
    else:
        import jax

        from lyra.backends.jax_impl.device import device_named as named

        assert named(None) is None
        assert named("cpu") == named("cpu:0") == jax.devices("cpu")[0]


@pytest.mark.parametrize(
    ("options", "message", "kind"),
    [
        ({"model": 5}, "model is 5; expected the path of a folder or .gguf file, or the name of a model", InputError),
        ({"model": b"folder"}, "model is b'folder'", InputError),
        ({"model": ""}, "model is ''", InputError),
        ({"model": "a\0b"}, "model is 'a\\x00b'", InputError),
        ({"context": 5}, "context is 5; expected a StaticContext or the path of its file", InputError),
        ({"context": b"book"}, "context is b'book'", InputError),
        ({"split": 5}, "split is 5; expected a HeadSplit", InputError),
        ({"mode": ["parallel"]}, "unknown mode ['parallel']; known: parallel, sequential", ModelError),
        ({"mode": np.array(["parallel", "a"])}, "unknown mode an array of shape (2,)", ModelError),
        ({"mode": None}, "unknown mode None", ModelError),
        ({"mesh": 4}, "mesh is 4; expected a jax.sharding.Mesh", InputError),
    ],
    ids=str,
)
def test_what_load_refuses(tiny_folder: Path, options: dict[str, Any], message: str, kind: type[Exception]) -> None:
    backend = "jax" if "mesh" in options else "torch"
    refused(lambda: lyra.load(**{"model": tiny_folder, "backend": backend, **options}), message, kind)


HEADS = "expected heads, whole numbers from 0 up, got "
SPLITS: dict[str, tuple[Callable[[], Any], str]] = {
    "number": (lambda: HeadSplit(5), HEADS + "5"),
    "text": (lambda: HeadSplit("12"), HEADS + "'12'"),
    "bytes": (lambda: HeadSplit(b"12"), HEADS + "b'12'"),
    "digits": (lambda: HeadSplit(("1", "2")), HEADS + "'1' among them"),
    "floats": (lambda: HeadSplit((1.0, 2.0)), HEADS + "1.0 among them"),
    "flags": (lambda: HeadSplit((True,)), HEADS + "True among them"),
    "None": (lambda: HeadSplit((None,)), HEADS + "None among them"),
    "table": (lambda: HeadSplit({1: 2}), HEADS + "{1: 2}"),
    "last_kv float": (lambda: HeadSplit.last_kv(SPEC, 1.5), "HeadSplit.last_kv: 1.5 KV heads asked for"),
    "last_kv whole float": (lambda: HeadSplit.last_kv(SPEC, 2.0), "HeadSplit.last_kv: 2.0 KV heads asked for"),
    "last_kv text": (lambda: HeadSplit.last_kv(SPEC, "2"), "HeadSplit.last_kv: '2' KV heads asked for"),
    "last_kv flag": (lambda: HeadSplit.last_kv(SPEC, True), "HeadSplit.last_kv: True KV heads asked for"),
    "last_q None": (lambda: HeadSplit.last_q(SPEC, None), "HeadSplit.last_q: None query heads asked for"),
    "last_q far": (lambda: HeadSplit.last_q(SPEC, 10**20), "query heads asked for, the layer has 16"),
    "from_kv number": (lambda: HeadSplit.from_kv_heads(SPEC, 3), "HeadSplit.from_kv_heads: " + HEADS + "3"),
    "from_kv floats": (lambda: HeadSplit.from_kv_heads(SPEC, [0.5]), "HeadSplit.from_kv_heads: " + HEADS + "0.5"),
    "from_q text": (lambda: HeadSplit.from_q_heads(SPEC, "01"), "HeadSplit.from_q_heads: " + HEADS + "'01'"),
    "no axes": (lambda: HeadSplit(np.array(1)), HEADS + "array(1)"),
    "from_q None": (lambda: HeadSplit.from_q_heads(SPEC, None), "HeadSplit.from_q_heads: " + HEADS + "None"),
    "half of nothing": (
        lambda: HeadSplit.half(None),
        "HeadSplit.half: expected an AttentionSpec or a ModelSpec",
    ),
    "all of a name": (lambda: HeadSplit.all("gemma-3-12b"), "HeadSplit.all: expected an AttentionSpec or a ModelSpec"),
    "bound to a name": (lambda: HeadSplit((1,)).bind("gemma-3-12b"), "HeadSplit.bind: expected an AttentionSpec"),
    "last_q of a number": (lambda: HeadSplit.last_q(4, 2), "HeadSplit.last_q: expected an AttentionSpec"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_what_is_no_split(name: str) -> None:
    call, message = SPLITS[name]
    refused(call, message, SpecError)


def test_heads_of_numpy_are_heads() -> None:
    split = HeadSplit.from_q_heads(SPEC, np.array([3, 2], np.int32))
    assert split == HeadSplit((2, 3)) == HeadSplit(np.arange(2, 4)) == HeadSplit(iter([3, 2]))
    assert [type(head) for head in split.lyra_q_heads] == [int, int]
    assert HeadSplit.last_kv(SPEC, np.int64(2)) == HeadSplit.last_kv(SPEC, 2)


BAD_CALLS: dict[str, tuple[Callable[[StaticContext], Any], str]] = {
    "take number": (lambda context: context.take(0), "kv_heads is 0; expected a list of whole numbers"),
    "take of no axes": (
        lambda context: context.take(np.array(0)),
        "kv_heads is array(0); expected a list of whole numbers",
    ),
    "holds": (lambda context: context.check_holds("1", [0]), "layer is '1'; expected a whole number"),
    "holds heads": (lambda context: context.static_layer(1, 0), "kv_heads is 0; expected a list of whole numbers"),
    "made of a list": (
        lambda context: replace(context, layers=[1]),
        "layers is [1]; expected a mapping, such as a dict",
    ),
    "made of no layers": (lambda context: replace(context, layers={1: 5}), "layer 1 is 5; expected a ContextLayer"),
    "made of no model": (
        lambda context: replace(context, fingerprint="a"),
        "fingerprint is 'a'; expected a Fingerprint",
    ),
    "ragged mask": (
        lambda context: replace(context, mask=[[True], []]),
        "mask is [[True], []]; expected bool [batch, tokens]",
    ),
    "ragged tokens": (
        lambda context: replace(context, tokens=[[1], []]),
        "tokens is [[1], []]; expected integers (1, 4)",
    ),
    "take text": (lambda context: context.take("0"), "kv_heads is '0'"),
    "take floats": (lambda context: context.take([0.0]), "kv_heads holds 0.0; expected whole numbers from 0 up"),
    "take of a layer": (lambda context: context.take({1: 0}), "kv_heads is 0"),
    "moved half": (lambda context: context.moved(1.5), "by is 1.5; expected how many positions to move by"),
    "moved text": (lambda context: context.moved("1"), "by is '1'"),
    "moved None": (lambda context: context.moved(None), "by is None"),
    "moved far": (lambda context: context.moved(10**30), "; expected how many positions to move by"),
    "row float": (lambda context: context.row(0.0), "index is 0.0; expected a whole number"),
    "row flag": (lambda context: context.row(False), "index is False"),
    "row None": (lambda context: context.row(None), "index is None"),
    "compose": (lambda context: context.compose("book"), "other is 'book'; expected a StaticContext"),
    "stack context": (lambda context: StaticContext.stack(context), "expected a list of StaticContexts"),
    "stack others": (lambda context: StaticContext.stack([context, 5]), "contexts[1] is 5; expected a StaticContext"),
    "stack None": (lambda context: StaticContext.stack(None), "contexts is None; expected a list of StaticContexts"),
    "save bytes": (lambda context: context.save(b"book"), "path is b'book'; expected a path (str or os.PathLike)"),
    "save None": (lambda context: context.save(None), "path is None"),
    "save nowhere": (lambda context: context.save(""), "path is ''"),
    "save half a character": (lambda context: context.save("\ud800"), "path is '\\ud800'"),
    "save NUL": (lambda context: context.save("a\0"), "path is 'a\\x00'"),
    "verify": (lambda _: StaticContext.load("book", verify="no"), "verify is 'no'; expected True or False"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_what_a_context_refuses(context: StaticContext, name: str) -> None:
    call, message = BAD_CALLS[name]
    refused(lambda: call(context), message)


def test_what_a_context_refuses_as_a_context(context: StaticContext) -> None:
    for dtype in (None, 5, ["int8"], np.float32):
        refused(lambda dtype=dtype: context.astype(dtype), "; a context is stored as one of", ContextError)
    refused(lambda: context.row(1), "there is no row 1; the context has 1", ContextError)
    refused(lambda: context.moved(-1), "negative", ContextError)
    with pytest.raises(TypeError, match="unsupported operand"):
        context + 5  # what Python says of any two objects


def test_what_an_injector_refuses(tiny_folder: Path, context: StaticContext) -> None:
    torch = pytest.importorskip("torch")
    from lyra.backends.torch_impl import GemmaInjector

    for model in (None, "gemma-3-270m", torch.nn.Linear(2, 2)):
        refused(lambda model=model: GemmaInjector(model), "holds 0 Gemma3TextModels")
    injector = GemmaInjector(lyra.load(tiny_folder).module)
    expected = "; expected a StaticContext"
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: injector.enable(5), "context is 5" + expected),
        (lambda: injector.enable(b"book"), "context is b'book'" + expected),
        (lambda: injector.enable(context, 5), "split is 5; expected a HeadSplit"),
        (lambda: injector.enable(context, override="no"), "override is 'no'; expected True or False"),
        (lambda: injector.enable(context, trainable=1), "trainable is 1; expected True or False"),
        (lambda: injector.attach(5), "external_kv_cache is 5" + expected),
        (lambda: injector.attach(context, gate="half"), "gate is 'half'; expected a finite number"),
        (lambda: injector.attach(context, gate=float("nan")), "gate is nan; expected a finite number"),
        (lambda: injector.attach(None, layers=3), "layers is 3; expected a list of whole numbers"),
        (lambda: injector.attach(context, layers="3"), "layers is '3'; expected a list of whole numbers"),
        (lambda: injector.attach(context, residual=0), "residual is 0; expected True or False"),
        (lambda: injector.capture([[2, 3.5]]), "dtype float64; expected whole numbers [B,T]"),
        (lambda: injector.capture([[2], [2, 3]]), "ids are [[2], [2, 3]]; expected whole numbers [B,T]"),
        (lambda: injector.capture([[2, 10**9]]), "the vocabulary has ids 0 to"),
        (lambda: injector.capture([[2, 3]], chunk_size=1.5), "chunk_size is 1.5"),
        (lambda: injector.capture([[2, 3]], layers=1), "layers is 1; expected a list of whole numbers"),
        (lambda: injector.context_of(5), "cache is 5; expected a Cache"),
    ]
    for call, message in calls:
        refused(call, message)
    assert not injector.enabled
    assert not injector.attached


def test_what_an_engine_refuses(backend: str, tiny_folder: Path) -> None:
    """Third parties call engines by themselves, with gates and layers that no front door has seen."""
    model = lyra.load(tiny_folder, backend=backend, mode="sequential")
    context = model.capture(IDS)
    static = {layer: context.static_layer(layer, [0, 1]) for layer in context.layers}
    engine: Any = model.engine
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: engine.gated([IDS], 1.5, static), "scored is 1.5; expected how many of the last"),
        (lambda: engine.gated([IDS], 4, static), "scored is 4"),
        (lambda: engine.gated([IDS, IDS], 1, static), "blended: ids have 2 rows; expected one"),
        (lambda: engine.gated([IDS], 1, {}), "blended: the context has no layer"),
        (lambda: engine.capture([IDS], 1), "capture: layers is 1; expected a list of whole numbers"),
        (lambda: engine.capture([IDS], [4]), "capture: there are no layers [4]; the model has 4"),
        (lambda: engine.capture([IDS], [1], on_chunk=5), "on_chunk is 5; expected a function, or None"),
        (lambda: engine.set_gates(5), "gates is 5; expected a mapping"),
        (lambda: engine.set_gates({0: 1.0}), "layers [0] have no block"),
        (lambda: engine.attach(5, {}, StaticSpec()), "static is 5; expected a list of whole numbers"),
        (lambda: engine.attach({}, {"a": HeadSplit()}, StaticSpec()), "layers ['a'] are not global"),
    ]
    for call, message in calls:
        refused(call, message)
    model.attach(context)
    for gate in ("1", None, True, float("nan"), 10**400):
        refused(lambda gate=gate: engine.set_gates({1: gate}), "; expected a finite number")
    with pytest.raises(SpecError, match=r"there is no layer 1\.0"):
        engine.attention_weights(1.0)
    made = engine.generate([IDS], max_new_tokens=2, stop_ids=[10**30])
    assert made.shape == (1, 2), "an id that no vocabulary has stops nothing"
